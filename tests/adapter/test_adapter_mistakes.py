"""Configurations and calls that are refused, with what is accepted."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import steered
from helpers.models import LAYERS, PROMPTS, tiny_model
from peft import get_peft_model

from peft_psr import PSRConfig


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers_to_transform": -1}, ValueError, "holds -1"),
        ({"layers_to_transform": [0, 1.5]}, TypeError, "1.5"),
        ({"layers_to_transform": "middle"}, TypeError, "'middle'"),
        ({"layers_to_transform": []}, ValueError, "empty list"),
        ({"layers_to_transform": True}, TypeError, "True"),
        ({"alpha": "strong"}, TypeError, "alpha must be a number, got 'strong'"),
        ({"alpha": float("nan")}, ValueError, "finite"),
        ({"coefficient_bias": None}, TypeError, "coefficient_bias"),
        ({"gate": "sigmoid"}, ValueError, "'relu', 'constant'"),
        ({"positions": "question"}, ValueError, "'question_and_response'"),
        ({"r": 0}, ValueError, "at least 1"),
        ({"r": 1.0}, TypeError, "r must be an int"),
        ({"init_weights": "ridge"}, TypeError, "initialize_psr_weights"),
    ],
)
def test_bad_configuration(settings, error, message):
    with pytest.raises(error, match=message):
        PSRConfig(**settings)


def test_layer_beyond_the_model_leaves_it_untouched():
    base = tiny_model()
    with pytest.raises(ValueError, match=f"layer {LAYERS}, but LlamaForCausalLM has {LAYERS} decoder layers"):
        get_peft_model(base, PSRConfig(layers_to_transform=LAYERS))
    assert not any("psr" in name for name, _ in base.named_modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": "2"}, TypeError, "alpha must be a number"),
        ({"alpha": [1.0, 2.0, 3.0]}, ValueError, "one per row"),
        ({"alpha": []}, ValueError, "one per row"),
        ({"alpha": torch.tensor([float("nan")])}, ValueError, "finite"),
        ({"alpha": torch.tensor([True])}, TypeError, "bools"),
        ({"steering_mask": torch.ones(1, 3)}, ValueError, "shape of input_ids"),
        ({"steering_mask": [1, 0]}, TypeError, "must be a tensor"),
    ],
)
def test_bad_call(arguments, error, message):
    model = steered(tiny_model())
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(error, match=message):
        model(ids, **arguments)
    with pytest.raises(error, match=message):
        model.generate(input_ids=ids, max_new_tokens=2, **arguments)
    model(ids)


def test_gate_values_of_an_adapter_that_is_not_active():
    model = steered(tiny_model())
    model.add_adapter("b", PSRConfig())
    with pytest.raises(ValueError, match="'b' is not active"):
        model.gate_values(torch.tensor(PROMPTS[:1]), adapter_name="b")


def test_unknown_adapter_is_named():
    model = steered(tiny_model())
    with pytest.raises(ValueError, match="No adapter 'formal'; there are: default"):
        model.set_alpha(1.0, "formal")
