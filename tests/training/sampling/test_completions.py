"""Completions are what the model said, token by token: what is kept, judged and trained on."""

from __future__ import annotations

import pytest
from helpers.models import byte_model, script
from helpers.tokenizers import CHATML, HARMONY, byte_tokenizer
from peft import get_peft_model
from transformers import GenerationConfig

from peft_psr import PSRConfig
from peft_psr.prompts.conversations import encode_prompt
from peft_psr.training import TripletCollator, sample_completions


STEERED = [{"role": "system", "content": "be formal"}, {"role": "user", "content": "what is tea"}]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_trained_are_tokens_drawn(seed):
    """A random model writes broken letters, special tokens, and words in other pieces than the tokenizer would."""
    tokenizer, model = byte_tokenizer(), byte_model(seed)
    drawn = sample_completions(model, tokenizer, [STEERED] * 8, max_new_tokens=24, seed=seed)
    again = 0
    for each in drawn:
        row = {"prompt": STEERED[1:], "steered_prompt": STEERED, "completion": each.text, "trait_score": 90.0}
        row |= {"truncated": each.truncated, "completion_ids": list(each.ids)}
        for ids, start in (("input_ids", STEERED[1:]), ("teacher_input_ids", STEERED)):
            assert TripletCollator(tokenizer).encode(row)[ids] == encode_prompt(tokenizer, start) + list(each.ids)
        again += tuple(tokenizer(each.text)["input_ids"]) == each.ids[: len(each.ids) - (not each.truncated)]
        if each.text:
            with pytest.raises(ValueError, match="completion_ids are not the tokens of the completion"):
                TripletCollator(tokenizer).encode({**row, "completion": each.text + "!"})
    assert again < len(drawn)  # else the texts would have done


def test_special_tokens_are_part_of_what_is_said(monkeypatch):
    channels = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"]
    tokenizer, model = byte_tokenizer(HARMONY, "<|return|>", channels), byte_model()
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>tea is good"
    ids = tokenizer(text + "<|return|>")["input_ids"]
    script(monkeypatch, model, ids)
    (drawn,) = sample_completions(model, tokenizer, [STEERED], max_new_tokens=60, temperature=0.0)
    assert (drawn.text, drawn.truncated, list(drawn.ids)) == (text, False, ids)
    assert drawn.answer == "tea is good"
    row = {"prompt": STEERED[1:], "steered_prompt": STEERED, "completion": drawn.text, "trait_score": 90.0}
    start = len(encode_prompt(tokenizer, STEERED))
    assert TripletCollator(tokenizer).encode(row)["teacher_input_ids"][start:] == ids  # from the text alone, too


@pytest.mark.parametrize(("said", "answer"), [("hm</think>\n\ntea", "tea"), ("hm, well", None)])
def test_reasoning_that_the_prompt_opens(monkeypatch, said, answer):
    tokenizer, model = byte_tokenizer(CHATML.replace("assistant\n", "assistant\n<think>\n")), byte_model()
    script(monkeypatch, model, tokenizer(said + "<|im_end|>")["input_ids"])
    (drawn,) = sample_completions(model, tokenizer, [STEERED], max_new_tokens=60, temperature=0.0)
    assert (drawn.text, drawn.opened, drawn.answer) == (said, True, answer)


def test_generation_settings_are_off_but_for_the_end():
    tokenizer, model = byte_tokenizer(), byte_model()
    plain = sample_completions(model, tokenizer, [STEERED] * 4, max_new_tokens=16)
    own = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=2, top_p=0.5, min_p=0.2, typical_p=0.5, repetition_penalty=3.0,
        no_repeat_ngram_size=1, suppress_tokens=list(range(60, 200)), begin_suppress_tokens=list(range(3, 290)),
        bad_words_ids=[[i] for i in range(30, 90)], sequence_bias=[[[99], 50.0]], min_new_tokens=15, max_length=40,
        exponential_decay_length_penalty=(1, 5.0), forced_eos_token_id=50, max_time=1e-9, num_beams=3,
        length_penalty=5.0, return_dict_in_generate=True, output_scores=True, num_return_sequences=3,
        renormalize_logits=True, remove_invalid_values=True, eos_token_id=1, pad_token_id=2,
        watermarking_config={"greenlist_ratio": 0.1, "bias": 20.0},
    )  # fmt: skip
    model.generation_config = own
    assert sample_completions(model, tokenizer, [STEERED] * 4, max_new_tokens=16) == plain
    assert model.generation_config is own
    steered = get_peft_model(model, PSRConfig())
    assert sample_completions(steered, tokenizer, [STEERED] * 4, max_new_tokens=16) == plain
    steered.generation_config = own  # the wrapper's own
    assert sample_completions(steered, tokenizer, [STEERED] * 4, max_new_tokens=16) == plain
    assert steered.generation_config is own and steered.get_base_model().generation_config is own


@pytest.mark.parametrize("pad", ["<|endoftext|>", None])
@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_texts_and_tokens_that_end_an_answer(monkeypatch, eos, pad):
    tokenizer, model = byte_tokenizer(eos=eos, pad=pad), byte_model()
    model.generation_config = GenerationConfig(eos_token_id=1 if eos else None, stop_strings=["good"])
    script(monkeypatch, model, tokenizer("tea is good for you")["input_ids"])
    (drawn,) = sample_completions(model, tokenizer, [STEERED], max_new_tokens=60, temperature=0.0)
    assert (drawn.text, drawn.truncated) == ("tea is good", False) and drawn.ids[-1] != 1
    row = {"prompt": STEERED[1:], "steered_prompt": STEERED, "completion": drawn.text, "trait_score": 90.0}
    encoded = TripletCollator(tokenizer).encode(row | {"completion_ids": list(drawn.ids)})
    assert encoded["input_ids"][encoded["prompt_length"] :] == list(drawn.ids)
