"""A LoRA that acts beneath PSR is part of the model: the teacher has it, training and switching PSR off leave it."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import lora, randomize, steered, steered_model
from helpers.models import logits, tiny_model
from helpers.runs import quiet_trainer
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft import LoraConfig, PeftModel, get_peft_model

from peft_psr import PSRConfig
from peft_psr.serving.chat_session import ChatSession
from peft_psr.training import initialize_psr_weights
from peft_psr.training.passes.branches import unedited


def lora_weights(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def by_transformers(folder):
    lora(tiny_model()).save_pretrained(folder)
    base = tiny_model()
    base.load_adapter(folder)
    return base


def over_a_lora(kind, folder):
    """The base of a PSR adapter: a LoRA loaded by transformers, or trainable by PEFT, of PSR's name or another."""
    if kind == "transformers":
        return by_transformers(folder)
    return lora(tiny_model(), adapter_name=kind).get_base_model()


@pytest.mark.parametrize("kind", ["default", "other", "transformers"])
@pytest.mark.parametrize("start", [None, "ridge"])
def test_training_leaves_the_lora_alone(kind, start, tmp_path):
    model = get_peft_model(over_a_lora(kind, tmp_path / "lora"), PSRConfig(), adapter_name="default")
    weights = lora_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    made = quiet_trainer(model, tmp_path, held_out=triplets(), num_train_epochs=1)
    made.evaluate()
    if start:
        initialize_psr_weights(model, triplets(), start, processing_class=tiny_tokenizer())
    made.train()
    assert len(weights) == 16 and not any(weight.requires_grad for weight in weights.values())
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in weights.items())
    assert any(layer.unit("default").direction.any() for layer in model.psr_layers().values())


@pytest.mark.parametrize("kind", ["default", "other", "transformers"])
def test_the_teacher_has_the_lora(kind, tmp_path):
    model = get_peft_model(over_a_lora(kind, tmp_path / "lora"), PSRConfig())
    expected = logits(lora(tiny_model()))
    randomize(model, ".direction", std=0.5)
    with unedited(model):
        assert torch.equal(logits(model), expected)
        assert all(p.requires_grad == ("psr_" in name) for name, p in model.named_parameters())
    assert not torch.equal(logits(model), expected)


def test_a_neutral_instruction_is_no_loss_over_a_lora(tmp_path):
    model = get_peft_model(lora(tiny_model()).get_base_model(), PSRConfig())
    made = quiet_trainer(model, tmp_path, held_out=triplets(instruction=""))
    assert made.evaluate()["eval_loss"] == 0


def test_a_chat_without_adapters_is_a_chat_with_the_lora():
    plain = ChatSession(steered(lora(tiny_model()).get_base_model()), tiny_tokenizer(), temperature=0)
    plain.use([])
    merged = ChatSession(steered(lora(tiny_model()).merge_and_unload()), tiny_tokenizer(), temperature=0)
    merged.use([])
    assert plain.ask("what is tea").text == merged.ask("what is tea").text


def test_another_type_of_adapter_is_switched_off_as_peft_does():
    model = lora(tiny_model())
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    model.requires_grad_(False)
    with unedited(model):
        assert torch.equal(logits(model), logits(tiny_model()))
    assert trainable and not any(weight.requires_grad for weight in model.parameters())


def test_modules_to_save_are_off_too():
    model = steered_model(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1.0)
    with unedited(model):
        assert torch.equal(logits(model), logits(tiny_model()))
    assert not torch.equal(logits(model), logits(steered_model()))
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert head.requires_grad


def lora_with_head(adapter_name):
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(), settings, adapter_name=adapter_name).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save[adapter_name].weight.mul_(-2.0)
    return model


def test_what_a_lora_saves_beside_it_stays_on_and_out_of_the_file(tmp_path):
    expected = logits(lora_with_head("other"))
    model = steered(lora_with_head("other").get_base_model())
    with unedited(model):
        assert torch.equal(logits(model), expected)
    assert not any("lm_head" in name for name, weight in model.named_parameters() if weight.requires_grad)
    ids = torch.tensor([[1, 9, 12], [1, 22, 35]])
    with torch.no_grad():
        rows = model(ids, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(rows[0], model(ids[:1]).logits[0])
    with unedited(model):
        torch.testing.assert_close(rows[1], model(ids[1:]).logits[0])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(lora_with_head("other").get_base_model(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(model.unload()), expected)


def test_modules_of_both_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'lm_head'.*adapter_name="):
        get_peft_model(lora_with_head("default").get_base_model(), PSRConfig())
    with pytest.raises(ValueError, match=r"'lm_head'.*merge_and_unload"):
        get_peft_model(lora_with_head("other").get_base_model(), PSRConfig(modules_to_save=["lm_head"]))


def test_peft_may_make_the_adapter_trainable_or_switch_it_off_and_on():
    model = steered(lora(tiny_model()).get_base_model())
    model.set_requires_grad("default")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    model.set_adapter("default")
    assert all(weight.requires_grad == ("psr_" in name) for name, weight in model.named_parameters())
