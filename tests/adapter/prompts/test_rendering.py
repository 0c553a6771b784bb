"""Tokenizers and chat templates that can't do something: refused in words at the one door, or done without."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import steered_model
from helpers.models import tiny_model
from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from helpers.triplets import triplets
from jinja2 import TemplateError

from peft_psr import PSRConfig
from peft_psr.evaluation.inspection.token_map import map_adapters
from peft_psr.positions import encode_chat
from peft_psr.prompts.conversations import encode_completion, encode_prompt, pad_id, render_prompt, turn_end_id
from peft_psr.prompts.rendering import TemplateRefusal
from peft_psr.serving.chat_session import ChatSession
from peft_psr.training import PSRTrainer, PSRTrainingArguments, TripletCollator, sample_completions


USER = {"role": "user", "content": "what is tea"}
SYSTEM = {"role": "system", "content": "be brief"}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def refusing():
    """As Gemma's."""
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "my/gemma"
    tokenizer.chat_template = NO_SYSTEM + CHAT_TEMPLATE
    return tokenizer


def test_a_refused_system_turn_is_named_with_the_way_out():
    refusal = r"'my/gemma' refuses the turns system, user \(System role not supported\)\. .*placement='before'"
    with pytest.raises(ValueError, match=refusal):
        encode_prompt(refusing(), [SYSTEM, USER])
    triplet = {"prompt": [USER], "steered_prompt": [SYSTEM, USER], "completion": "tea is good", "trait_score": 90}
    collator = TripletCollator(refusing())
    with pytest.raises(ValueError, match=f"formal\\[3\\]: .*{refusal}"):
        collator.encode(triplet, "formal[3]")
    with pytest.raises(ValueError, match=f"train_dataset\\[0\\]: .*{refusal}"):
        PSRTrainer(tiny_model(), PSRTrainingArguments("unused"), [triplet], processing_class=refusing(),
                   peft_config=PSRConfig())  # fmt: skip
    with pytest.raises(ValueError, match=refusal):
        sample_completions(tiny_model(), refusing(), [[SYSTEM, USER]], max_new_tokens=2)
    with pytest.raises(ValueError, match="refuses this: System role not supported"):
        ChatSession(steered_model(), refusing(), system="be brief")


def test_a_refusal_stays_a_template_error():
    """Where a template is asked whether it knows a role."""
    with pytest.raises(TemplateError) as error:
        render_prompt(refusing(), [SYSTEM, USER])
    assert isinstance(error.value, TemplateRefusal) and error.value.reason == "System role not supported"
    assert encode_chat(refusing(), [[USER]], "question_and_response")["steering_mask"].all()


def test_other_mistakes_of_a_template_are_one_line_too():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match="refuses the turns user .can only concatenate") as error:
        render_prompt(tokenizer, [USER])
    assert "placement" not in str(error.value)
    tokenizer.chat_template = "{% for"
    with pytest.raises(ValueError, match="refuses the turns user"):
        turn_end_id(tokenizer, [USER])


class MistralCommonBackend:
    """What transformers' class of that name does not have, without the package behind it."""

    name_or_path, chat_template = "mistralai/some", "set by hand"


def test_tokenizers_of_mistral_common_are_refused_by_name():
    # they would encode "[INST]" of a rendered prompt as letters
    with pytest.raises(ValueError, match=r"'mistralai/some' is mistral-common's \(MistralCommonBackend.*mistral_form"):
        render_prompt(MistralCommonBackend(), [USER])
    assert render_prompt(MistralCommonBackend(), "plain text") == "plain text"


def bare(pad=None, eos=None):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = pad, eos
    return tokenizer


def test_padding_without_a_pad_token():
    assert pad_id(bare(pad="<pad>", eos="</t>")) == 0
    assert pad_id(bare(eos="</t>")) == bare(eos="</t>").eos_token_id == 2
    assert pad_id(bare()) == 0


def test_no_pad_and_no_eos_token(tmp_path):
    tokenizer, whole = bare(), tiny_tokenizer()
    assert encode_completion(tokenizer, [USER], "tea is good") == encode_completion(whole, [USER], "tea is good")
    texts = {}
    for name, which in (("bare", tokenizer), ("whole", whole)):
        prompts = [[USER], [SYSTEM, USER]]
        texts[name] = [c.text for c in sample_completions(steered_model(), which, prompts, max_new_tokens=5, seed=1)]
    assert texts["bare"] == texts["whole"]
    greedy = {"max_new_tokens": 4, "temperature": 0.0}
    first, second = (ChatSession(steered_model(), which, **greedy).ask("what is tea") for which in (tokenizer, whole))
    assert first.text == second.text
    (shown,) = map_adapters(steered_model(), tokenizer, "what is tea", "tea is good")
    assert "".join(shown.tokens).split() == ["<assistant>", "tea", "is", "good", "</t>"]
    batch = TripletCollator(tokenizer)(triplets())
    assert all(values.dtype in (torch.long, torch.float32, torch.bool) for values in batch.values())
    losses = []
    for which in (tokenizer, whole):
        arguments = PSRTrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True)
        trainer = PSRTrainer(tiny_model(), arguments, triplets(), processing_class=which, peft_config=PSRConfig())
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1])
