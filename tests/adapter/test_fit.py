"""Adapters on models that they do not fit: what finds no place is named, and nothing loaded at all is an error."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapters import steered_model
from helpers.models import LAYERS, logits, tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_psr import PSRConfig, PSRWarning
from peft_psr.hub.steered_model import load_with_adapters


def llama(layers=LAYERS, width=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def adapter(tmp_path):
    steered_model(init_weights=False).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def of_another_class(adapter):
    """As saved from a multimodal class, where the decoder has a longer name."""
    file = adapter / "adapter_model.safetensors"
    tensors = {
        key.replace("model.layers", "model.language_model.layers"): value for key, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def by_from_pretrained(base, adapter):
    return PeftModel.from_pretrained(base, adapter)


def by_load_adapter(base, adapter):
    model = get_peft_model(base, PSRConfig(), adapter_name="first")
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    return model


def by_transformers(base, adapter):
    base.load_adapter(adapter)
    return base


def by_auto_peft(base, adapter):
    base.save_pretrained(adapter.parent / "base")
    config = adapter / "adapter_config.json"
    named = {**json.loads(config.read_text()), "base_model_name_or_path": str(adapter.parent / "base")}
    config.write_text(json.dumps(named))
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def by_auto_model(base, adapter):
    base.save_pretrained(adapter.parent / "base")
    model = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    model.load_adapter(adapter, adapter_name="other")
    return model


def by_state_dict(base, adapter):
    model = get_peft_model(base, PSRConfig(), adapter_name="mine")
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"), "mine")
    return model


def by_psr(base, adapter):
    base.save_pretrained(adapter.parent / "base")
    tiny_tokenizer().save_pretrained(adapter.parent / "base")
    return load_with_adapters(str(adapter.parent / "base"), {"named": str(adapter)})[0]


DOORS = [by_from_pretrained, by_load_adapter, by_transformers, by_auto_peft, by_auto_model, by_state_dict, by_psr]


@pytest.mark.parametrize("door", DOORS)
def test_a_shallower_model(door, adapter):
    with pytest.warns(PSRWarning, match=r"model\.layers\.2, model\.layers\.3 have no place there and are left out"):
        door(llama(2), adapter)


@pytest.mark.parametrize("door", DOORS)
def test_a_deeper_model(door, adapter):
    with pytest.warns(PSRWarning, match=rf"no weights for model\.layers\.{LAYERS}, model\.layers\.{LAYERS + 1}"):
        model = door(llama(LAYERS + 2), adapter)
    layers = [module for name, module in model.named_modules() if name.endswith(".psr")]
    assert len(layers) == LAYERS + 2
    for layer in layers[LAYERS:]:  # not the random start of their configuration
        assert not layer.unit(layer.active_adapters[0]).direction.any()


@pytest.mark.parametrize("door", DOORS)
def test_another_class_of_model(door, adapter):
    of_another_class(adapter)
    with pytest.raises(
        ValueError,
        match=r"does not fit the model, a LlamaForCausalLM.*model\.language_model\.layers\.0.*model\.layers",
    ):
        door(llama(), adapter)


@pytest.mark.parametrize("door", [by_from_pretrained, by_load_adapter, by_auto_peft, by_state_dict, by_psr])
def test_a_wider_model(door, adapter):
    with pytest.raises((RuntimeError, ValueError), match="for a stream of 32 features, and the model's has 64"):
        door(llama(width=64), adapter)


def test_a_wider_model_by_transformers(adapter):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # its report names the widths
        llama(width=64).load_adapter(adapter)
    model = PeftModel.from_pretrained(llama(width=64), adapter, ignore_mismatched_sizes=True)
    assert torch.equal(logits(model.eval()), logits(llama(width=64)))


@pytest.mark.parametrize("door", DOORS)
def test_what_fits_is_loaded_without_a_word(door, adapter, recwarn):
    model = door(tiny_model(), adapter).eval()
    assert torch.equal(logits(model), logits(steered_model(init_weights=False)))
    assert not [warning for warning in recwarn if warning.category is PSRWarning]


def test_other_weights_of_the_file_are_named_too(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(
        {**load_file(file), "base_model.model.model.wte.weight": torch.zeros(2, 2)}, file, metadata={"format": "pt"}
    )
    with pytest.warns(PSRWarning, match=r"model\.wte\.weight have no place"):
        PeftModel.from_pretrained(tiny_model(), adapter)


def test_a_second_adapter_beside_a_loaded_one(adapter, recwarn):
    base = tiny_model()
    base.load_adapter(adapter, adapter_name="one")
    base.load_adapter(adapter, adapter_name="two")
    assert not [warning for warning in recwarn if warning.category is PSRWarning]


def test_an_adapter_in_training_keeps_what_a_file_has_not():
    model = get_peft_model(tiny_model(), PSRConfig(init_weights=False))
    before = model.psr_layers()[2].unit("default").direction.clone()
    some = {key: value + 1 for key, value in get_peft_model_state_dict(model).items() if ".layers.0." in key}
    with pytest.warns(PSRWarning, match="no weights for"):
        set_peft_model_state_dict(model, some)
    assert before.any() and torch.equal(model.psr_layers()[2].unit("default").direction, before)
