"""PSR together with a LoRA on one model: whatever PEFT lets a user do, nothing is dropped silently.

Docstrings are lines of the table of modes in `docs/layouts.md`.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers.adapters import lora, steered
from helpers.models import generate, logits, tiny_model
from peft import LoraConfig, PeftConfig, PeftModel

from peft_psr import PSRConfig, PSRWarning
from peft_psr.hub.saved_adapters import read_adapter


def test_over_a_merged_lora(tmp_path):
    """PSR over a merged LoRA: an ordinary adapter of the merged model, saved and reloaded onto it."""
    merged = lora(tiny_model()).merge_and_unload()
    model = steered(copy.deepcopy(merged))
    expected = logits(model)
    assert not torch.equal(expected, logits(steered(tiny_model())))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(merged, tmp_path).eval()), expected)


@pytest.mark.parametrize("adapter_name", ["default", "psr"])
def test_over_an_unmerged_lora(adapter_name, tmp_path):
    """PSR over a live LoRA, of the same adapter name or another: both act, each is saved alone, the LoRA stays."""
    lora_logits = logits(lora(tiny_model()))
    model = steered(lora(tiny_model()).base_model.model, adapter_name=adapter_name)
    expected = logits(model)
    torch.testing.assert_close(expected, logits(steered(lora(tiny_model()).merge_and_unload())), atol=1e-3, rtol=1e-3)
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    again = PeftModel.from_pretrained(lora(tiny_model()).base_model.model, folder).eval()
    assert torch.equal(logits(again), expected)

    def lora_alone():
        with model.alpha_scale(0.0):
            return torch.equal(logits(model), lora_logits)

    assert lora_alone()
    model.add_adapter("second", PSRConfig())
    model.set_adapter("second")
    assert lora_alone()
    model.set_adapter(adapter_name)
    model.delete_adapter("second")
    assert lora_alone() and torch.equal(logits(model), expected)
    with model.disable_adapter():  # the base without any adapter, as everywhere in PEFT
        assert torch.equal(logits(model), logits(tiny_model()))
    assert torch.equal(logits(model.unload()), lora_logits)


@pytest.mark.parametrize("over", ["the PeftModel", "its base model"])
def test_what_lies_beneath_keeps_its_configuration(over, tmp_path):
    """PSR over a live LoRA, both called "default": the LoRA's `PeftModel` saves and loads as before, also after."""
    beneath = lora(tiny_model())
    expected = logits(beneath)
    model = steered(beneath if over == "the PeftModel" else beneath.get_base_model())
    assert isinstance(beneath.peft_config["default"], LoraConfig) and list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path / "psr")
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "psr"), PSRConfig)
    beneath.save_pretrained(tmp_path / "with psr")
    model.unload()
    assert isinstance(beneath.peft_config["default"], LoraConfig) and torch.equal(logits(beneath), expected)
    beneath.save_pretrained(tmp_path / "alone")
    for folder in ("with psr", "alone"):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / folder).eval()), expected)


@pytest.mark.parametrize("saved_over", ["the PeftModel", "its base model"])
@pytest.mark.parametrize("loaded_over", ["the PeftModel", "its base model", "the merged model"])
def test_an_adapter_fits_with_a_lora_beneath_however_it_is_called(saved_over, loaded_over, tmp_path):
    """Saved over a LoRA's `PeftModel` or over the model in it, loaded over either or over the merged model: equal."""
    under = {
        "the PeftModel": lambda model: model,
        "its base model": lambda model: model.get_base_model(),
        "the merged model": lambda model: model.merge_and_unload(),
    }
    model = steered(under[saved_over](lora(tiny_model())))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSRWarning)
        again = PeftModel.from_pretrained(under[loaded_over](lora(tiny_model())), tmp_path).eval()
        again.load_adapter(tmp_path, adapter_name="second")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-3, rtol=1e-3)
    again.set_adapter("second")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-3, rtol=1e-3)
    assert list(read_adapter(tmp_path).units) == [f"model.layers.{layer}" for layer in range(4)]


def test_under_a_lora():
    """LoRA over a live PSR adapter: both act; merging the LoRA leaves the PSR adapter in place."""
    base = steered(tiny_model(), adapter_name="psr").get_base_model()
    model = lora(base)
    expected = logits(model)
    torch.testing.assert_close(expected, logits(steered(lora(tiny_model()).merge_and_unload())), atol=1e-3, rtol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(generate(merged), generate(merged, use_cache=False))


def test_lora_and_psr_are_not_mixed_in_one_peft_model(tmp_path):
    """A LoRA added to a PSR `PeftModel`, or the reverse, is refused by name, and the model is left as it was."""
    model = steered(tiny_model())
    expected = logits(model)
    with pytest.raises(ValueError, match="LORA.*PSR|PSR.*LORA"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="LORA.*PSR|PSR.*LORA"):
        lora(tiny_model()).add_adapter("other", PSRConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LORA.*PSR|PSR.*LORA"):
        lora(tiny_model()).load_adapter(tmp_path, "other")


def test_a_second_peft_model_over_the_same_base():
    """`get_peft_model` on a model that PSR edits already: the new adapter alone is active."""
    second = steered(steered(tiny_model()).get_base_model(), seed=7, adapter_name="other")
    assert second.active_adapters == ["other"]
    alone = steered(tiny_model(), seed=7, adapter_name="other")
    assert torch.equal(logits(second), logits(alone))
