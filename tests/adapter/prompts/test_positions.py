"""Masks: which tokens of which conversation are edited."""

from __future__ import annotations

import pytest
import torch
from helpers.tokenizers import tiny_tokenizer

from peft_psr.positions import chat_mask, default_mask, encode_chat, last_token_mask, question_start, response_mask
from peft_psr.prompts.conversations import encode_completion, encode_prompt


USER = {"role": "user", "content": "what is tea"}
SYSTEM = {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "tea is good"}
AGAIN = {"role": "user", "content": "yes"}

# what some real templates do: add a default system turn; refuse the system role
QWEN_LIKE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<system> now </t> ' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </t> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
GEMMA_LIKE = (
    "{{ '<s> ' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </t> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokens(tokenizer, messages, mask):
    ids = encode_prompt(tokenizer, messages)
    assert len(ids) == len(mask)
    return tokenizer.convert_ids_to_tokens([i for i, m in zip(ids, mask, strict=True) if m])


def test_response_is_the_last_prompt_token():
    tokenizer = tiny_tokenizer()
    assert tokens(tokenizer, [SYSTEM, USER], chat_mask(tokenizer, [SYSTEM, USER])) == ["<assistant>"]


def test_question_starts_at_the_last_token_of_the_system_turn():
    tokenizer = tiny_tokenizer()
    mask = chat_mask(tokenizer, [SYSTEM, USER], "question_and_response")
    assert tokens(tokenizer, [SYSTEM, USER], mask) == ["</t>", "<user>", "what", "is", "tea", "</t>", "<assistant>"]
    mask = chat_mask(tokenizer, [USER], "question_and_response")
    assert tokens(tokenizer, [USER], mask) == ["<user>", "what", "is", "tea", "</t>", "<assistant>"]


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER]])
def test_question_start_with_a_default_system_turn(messages):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN_LIKE
    mask = chat_mask(tokenizer, messages, "question_and_response")
    assert tokens(tokenizer, messages, mask) == ["</t>", "<user>", "what", "is", "tea", "</t>", "<assistant>"]


def test_question_start_without_a_system_role():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GEMMA_LIKE
    assert question_start(tokenizer, [USER]) == 0


def test_earlier_turns_are_edited_as_when_they_were_generated():
    tokenizer = tiny_tokenizer()
    conversation = [SYSTEM, USER, ANSWER, AGAIN]
    mask = chat_mask(tokenizer, conversation)
    assert tokens(tokenizer, conversation, mask) == ["<assistant>", "tea", "is", "good", "<assistant>"]
    first = encode_prompt(tokenizer, [SYSTEM, USER])
    generated = encode_completion(tokenizer, [SYSTEM, USER], ANSWER["content"])
    assert encode_prompt(tokenizer, conversation)[: len(first) + len(generated)] == first + generated
    assert mask[: len(first) + len(generated)] == [0] * (len(first) - 1) + [1] * len(generated) + [0]


@pytest.mark.parametrize("template", [None, QWEN_LIKE])
def test_a_conversation_that_the_assistant_opens(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    messages = [ANSWER, AGAIN, ANSWER, USER]
    expected = ["<assistant>", "tea", "is", "good"] * 2 + ["<assistant>"]
    assert tokens(tokenizer, messages, chat_mask(tokenizer, messages)) == expected


def test_encode_chat_pads_on_the_left():
    tokenizer = tiny_tokenizer()
    batch = encode_chat(tokenizer, [[USER], [SYSTEM, USER]])
    assert batch["attention_mask"][0].tolist() == [0, 0, 0, 0] + [1] * 7
    assert batch["steering_mask"].tolist() == [[0] * 10 + [1], [0] * 10 + [1]]


def test_masks_of_padded_batches():
    left, right = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 0, 0]])
    assert last_token_mask(left).tolist() == [[False, False, False, True]]
    assert last_token_mask(right).tolist() == [[False, True, False, False]]
    assert default_mask("all", right).tolist() == [[True, True, False, False]]
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    assert response_mask(labels).tolist() == [[False, True, True, True, False]]


def test_errors_name_the_value():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="'answer'"):
        chat_mask(tokenizer, [USER], "answer")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_mask(tokenizer, [USER])
