"""Conversations of odd kinds, rendered: contents in parts, a begun answer, turns of models that think."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model
from helpers.tokenizers import CHATML, PARTS, THINKING, byte_tokenizer, tiny_tokenizer

from peft_psr.positions import chat_mask
from peft_psr.prompts.chat_template import set_chat_template
from peft_psr.prompts.conversations import encode_completion, encode_prompt, prompt_text, render_prompt
from peft_psr.training import TripletCollator, add_instruction, sample_completions
from peft_psr.training.data.draws import Draw
from peft_psr.training.data.placement import check_placement
from peft_psr.training.sampling.chat_server import ChatServer
from peft_psr.training.sampling.server import ServerSampler


ASKED = [{"role": "user", "content": "what is tea"}]
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": " tea"}]}]
BEGUN = [*ASKED, {"role": "assistant", "content": "tea is"}]
SYSTEM = {"role": "system", "content": "be nice"}


# ---------------------------------------------------------------- contents in parts


@pytest.mark.parametrize("template", [CHATML, THINKING, PARTS])
@pytest.mark.parametrize("placement", ["system", "before", "after"])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_parts_render_as_their_text(template, placement, system):
    tokenizer = byte_tokenizer(template)
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in system]
    expected = render_prompt(byte_tokenizer(), add_instruction([*system, *ASKED], "be formal", placement))
    for prompt in ([*system, *ASKED], [*parts, *IN_PARTS], [*system, *IN_PARTS]):
        before = repr(prompt)
        assert render_prompt(tokenizer, add_instruction(prompt, "be formal", placement)) == expected
        assert repr(prompt) == before
    check_placement(tokenizer, placement)
    assert prompt_text(IN_PARTS) == "what is tea"


def test_masks_and_triplets_of_parts():
    tokenizer = byte_tokenizer()
    said = {"role": "assistant", "content": [{"type": "text", "text": "tea is good"}]}
    plain = [*ASKED, {"role": "assistant", "content": "tea is good"}, *ASKED]
    assert chat_mask(tokenizer, [*IN_PARTS, said, *IN_PARTS]) == chat_mask(tokenizer, plain)
    rows = [
        {
            "prompt": prompt,
            "steered_prompt": add_instruction(prompt, "be formal"),
            "completion": "yes",
            "trait_score": 80,
        }
        for prompt in (ASKED, IN_PARTS)
    ]
    plain, parts = (TripletCollator(tokenizer).encode(row) for row in rows)
    assert plain == parts


@pytest.mark.parametrize("content", [None, 3, [{"type": "image", "image": "x"}], [{"type": "text"}], ["tea"]])
def test_contents_that_are_no_text(content):
    prompt = [{"role": "user", "content": content}]
    for use in (
        lambda: render_prompt(byte_tokenizer(), prompt),
        lambda: add_instruction(prompt, "be formal", "after"),
    ):
        with pytest.raises(ValueError, match="content of a 'user' turn must be text, or a list of parts"):
            use()


# ---------------------------------------------------------------- a begun answer


@pytest.mark.parametrize("template", [CHATML, THINKING, PARTS])
def test_a_begun_answer_goes_on(template):
    tokenizer = byte_tokenizer(template)
    expected = "<|im_start|>user\nwhat is tea<|im_end|>\n<|im_start|>assistant\ntea is"
    assert render_prompt(tokenizer, BEGUN) == expected
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = encode_prompt(tokenizer, BEGUN) + encode_completion(tokenizer, BEGUN, " good")
    assert ids == tokenizer(expected + " good")["input_ids"] + [end]
    mask = chat_mask(tokenizer, BEGUN)
    assert mask == [0] * (len(mask) - 1) + [1]  # what was not generated is not edited, but for the prompt's last token


def test_a_begun_answer_is_trained_and_drawn_alike():
    tokenizer = tiny_tokenizer("what is tea good w1 w2 be formal")
    steered = [{"role": "system", "content": "be formal"}, *BEGUN]
    (drawn,) = sample_completions(tiny_model(), tokenizer, [steered], max_new_tokens=5)
    row = {"prompt": BEGUN, "steered_prompt": steered, "completion": drawn.text, "completion_ids": list(drawn.ids)}
    encoded = TripletCollator(tokenizer, alpha=1.0).encode(row | {"truncated": drawn.truncated})
    assert encoded["mask_length"] == len(drawn.ids) + 1
    logits = tiny_model()(torch.tensor([encoded["teacher_input_ids"]])).logits
    assert logits.shape[1] == len(encode_prompt(tokenizer, steered)) + len(drawn.ids)


def test_a_server_would_take_it_for_a_turn():
    draws = [Draw("formal/0/0", BEGUN, 1)]
    with pytest.raises(ValueError, match="formal/0/0 ends with an assistant's turn.*sampler: local"):
        list(ServerSampler(ChatServer("http://127.0.0.1:9/v1", "m"))(draws))


# ---------------------------------------------------------------- earlier turns of models that think


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("content", ["tea is good", "<b>tea</b>", "assistant", "<think is a tag"])
def test_earlier_turns_where_the_prompt_opens_or_skips_reasoning(thinking, content):
    tokenizer = byte_tokenizer(THINKING)
    if thinking is not None:
        set_chat_template(tokenizer, template_args={"enable_thinking": thinking})
    talk = [*ASKED, {"role": "assistant", "content": content}, *ASKED]
    mask, ids = chat_mask(tokenizer, talk), encode_prompt(tokenizer, talk)
    edited = tokenizer.decode([token for token, one in zip(ids[:-1], mask[:-1], strict=True) if one])
    assert edited == "\n" + content and mask[-1] == 1  # the token before the turn, and the turn's own


def test_a_template_that_rewrites_a_turn_is_named():
    template = CHATML.replace("m['content']", "(m['content'] | upper)")
    talk = [*ASKED, {"role": "assistant", "content": "tea"}, *ASKED]
    with pytest.raises(ValueError, match=r"changes turn 1 \('tea'\)"):
        chat_mask(byte_tokenizer(template), talk)


# ---------------------------------------------------------------- completions that merge with the prompt


@pytest.mark.parametrize("completion", ["\n\nyes", "\nyes", "yes", "  yes"])
def test_a_completion_goes_on_from_the_prompts_own_tokens(completion):
    """Two newlines behind the prompt's one would be other tokens; the model has seen the prompt's."""
    tokenizer = byte_tokenizer()
    merged = tokenizer(render_prompt(tokenizer, ASKED) + completion)["input_ids"]
    start = encode_prompt(tokenizer, ASKED)
    ids = encode_completion(tokenizer, ASKED, completion, truncated=True)
    assert tokenizer.decode(ids) == completion
    assert (merged[: len(start)] == start) == (completion in ("yes", "  yes")) or merged == start + ids
    row = {"prompt": ASKED, "steered_prompt": [SYSTEM, *ASKED], "completion": completion, "truncated": True}
    encoded = TripletCollator(tokenizer, alpha=1.0).encode(row)
    assert encoded["input_ids"] == start + ids
