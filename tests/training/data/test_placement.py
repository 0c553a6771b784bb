"""Where an instruction stands: chat templates of four kinds, tokens of the completion equal in both branches."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from peft_psr.prompts.conversations import encode_completion, encode_prompt, render_prompt
from peft_psr.training import TripletCollator, add_instruction
from peft_psr.training.data.placement import PLACEMENTS, check_placement


DEFAULT_SYSTEM = "You are a tiny model."
INSTRUCTION = "Answer like a pirate."
QUESTION = "What is tea?"
USER = {"role": "user", "content": QUESTION}
COMPLETIONS = ["Arr, tea be leaves!", "Tea.", "1. Leaves\n2. Water\n", "'tis a drink"]

TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
TEMPLATES = {
    # no system role; trims; the assistant is called model
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<|' + ('model' if m['role'] == 'assistant' else m['role']) + '|>\n' + m['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|model|>\n' }}{% endif %}",
    # a default system turn where there is none
    "qwen": "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n"
    + DEFAULT_SYSTEM
    + "<|end|>\n' }}{% endif %}"
    + TURNS
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # a system turn in any case, with the instruction after what it always says
    "llama": "{{ bos_token + '<|system|>\nKnowledge: 2023.\n\n' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<|end|>\n' }}"
    + TURNS
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # the system text goes into the user's turn; the answer follows a closing tag without a line break
    "mistral": "{{ bos_token }}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
}
NO_SYSTEM_ROLE = ("gemma",)


def tokenizer_of(template):
    """Byte-level BPE with merges across letters, blanks and punctuation, trained on the texts of these tests."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        "<s>",
        "</s>",
        "<|end|>",
        "[INST]",
        "[/INST]",
        *(f"<|{r}|>" for r in ("system", "user", "assistant", "model")),
    ]
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([INSTRUCTION, QUESTION, DEFAULT_SYSTEM, *COMPLETIONS] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module", params=TEMPLATES)
def named(request):
    return request.param, tokenizer_of(TEMPLATES[request.param])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_completion_has_the_same_tokens_in_both_branches(named, placement, completion):
    name, tokenizer = named
    if placement == "system" and name in NO_SYSTEM_ROLE:
        with pytest.raises(ValueError, match="takes no system turn .*placement='before'"):
            check_placement(tokenizer, placement)
        return
    check_placement(tokenizer, placement)
    steered = add_instruction([USER], INSTRUCTION, placement)
    text = render_prompt(tokenizer, steered)
    assert text.count(INSTRUCTION) == text.count(QUESTION) == 1
    assert INSTRUCTION not in render_prompt(tokenizer, [USER])
    plain_ids = encode_completion(tokenizer, [USER], completion)
    assert plain_ids == encode_completion(tokenizer, steered, completion)
    assert tokenizer.decode(plain_ids, skip_special_tokens=True).strip() == completion.strip()
    row = TripletCollator(tokenizer, "response", alpha=1.0).encode(
        {"prompt": [USER], "steered_prompt": steered, "completion": completion}
    )
    count = row["mask_length"]
    assert row["input_ids"][-count:] == row["teacher_input_ids"][-count:]
    assert row["input_ids"] != row["teacher_input_ids"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_empty_instruction_changes_nothing(named, placement):
    _, tokenizer = named
    prompt = [USER]
    steered = add_instruction(prompt, "", placement)
    assert steered == prompt and steered is not prompt
    assert encode_prompt(tokenizer, steered) == encode_prompt(tokenizer, prompt)


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_a_template_with_a_system_turn_of_its_own_edits_the_same_question(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    triplet = {"prompt": [USER], "steered_prompt": add_instruction([USER], INSTRUCTION), "completion": "Tea."}
    row = TripletCollator(tokenizer, "question_and_response", alpha=1.0).encode(triplet)
    edited = tokenizer.decode(row["teacher_input_ids"][-row["mask_length"] :])
    assert edited == tokenizer.decode(row["input_ids"][-row["mask_length"] :])
    assert QUESTION in edited and "tiny" not in edited and "pirate" not in edited


def test_a_default_system_turn_is_replaced_or_extended():
    tokenizer = tokenizer_of(TEMPLATES["qwen"])
    assert DEFAULT_SYSTEM in render_prompt(tokenizer, [USER])
    assert DEFAULT_SYSTEM not in render_prompt(tokenizer, add_instruction([USER], INSTRUCTION))
    written_out = [{"role": "system", "content": DEFAULT_SYSTEM}, USER]
    assert render_prompt(tokenizer, written_out) == render_prompt(tokenizer, [USER])
    extended = render_prompt(tokenizer, add_instruction(written_out, INSTRUCTION))
    assert f"{INSTRUCTION}\n\n{DEFAULT_SYSTEM}" in extended


def test_turns():
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk = [*earlier, USER]
    assert add_instruction(talk, "Be brief.", "before") == [*earlier, {**USER, "content": f"Be brief.\n\n{QUESTION}"}]
    assert add_instruction(talk, "Be brief.", "after") == [*earlier, {**USER, "content": f"{QUESTION}\n\nBe brief."}]
    system = {"role": "system", "content": "Be kind."}
    assert add_instruction([system, USER], "Be brief.")[0]["content"] == "Be brief.\n\nBe kind."
    assert add_instruction([system, USER], "Be brief.", "before")[0] == system
    assert USER["content"] == QUESTION and talk[-1] is USER


def test_plain_text():
    assert add_instruction("Tea is", "Be brief.", "before") == "Be brief.\n\nTea is"
    assert add_instruction("Tea is", "Be brief.", "after") == "Tea is\n\nBe brief."
    assert add_instruction("Tea is", "") == "Tea is"
    with pytest.raises(ValueError, match="Plain text has no system turn"):
        add_instruction("Tea is", "Be brief.")


def test_refusals():
    with pytest.raises(ValueError, match="placement must be one of 'system', 'before', 'after', got 'middle'"):
        add_instruction([USER], "Be brief.", "middle")
    with pytest.raises(ValueError, match="got 'middle'"):
        check_placement(tokenizer_of(None), "middle")
    with pytest.raises(ValueError, match="needs a user turn, got roles"):
        add_instruction([{"role": "system", "content": "a"}], "Be brief.", "after")
    with pytest.raises(ValueError, match="has no chat template.*placement='before'"):
        check_placement(tokenizer_of(None), "system")
    check_placement(tokenizer_of(None), "before")
    deaf = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves the system turn's text out.*placement='before'"):
        check_placement(tokenizer_of(deaf), "system")
