"""Layers leave for each other what is the same on all of them; it is of one call and one state of the adapters."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from helpers.adapters import randomize, weights_of
from helpers.models import LAYERS, WIDTH, tiny_model
from helpers.reference import naive_edit, naive_logits
from peft import get_peft_model

from peft_psr import PSRConfig
from peft_psr.call_state import SteeringState
from peft_psr.unit import PSRUnit


IDS = [9]  # one token: it is edited whatever the positions, so that the strength is a number
ALPHAS = {"a": 1.5, "b": -0.5}


@pytest.fixture
def model():
    """Adapters "a" and "b" on all layers and tokens, "a" active."""
    model = get_peft_model(tiny_model(), PSRConfig(positions="all", alpha=ALPHAS["a"]), adapter_name="a")
    model.add_adapter("b", PSRConfig(positions="all", r=2, alpha=ALPHAS["b"]))
    randomize(model, seed=0, std=0.3)
    return model.eval().requires_grad_(False)


def run(model):
    return model(torch.tensor([IDS])).logits[0]


def check_edit_by_itself(model, *expected):
    """The edit of a layer that is called by itself: [(adapter, strength), ...]."""
    hidden = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    edited = hidden[0]
    for name, alpha in expected:
        edited = edited + naive_edit(hidden[0], *weights_of(model, name)[2], [1] * 3, alpha) - hidden[0]
    torch.testing.assert_close(model.psr_layers()[2](hidden)[0], edited, atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_called_by_itself_follows_every_change(model):
    run(model)
    check_edit_by_itself(model, ("a", 1.5))
    model.set_adapter("b")
    check_edit_by_itself(model, ("b", -0.5))
    run(model)
    model.base_model.set_adapter(["b", "a"])
    check_edit_by_itself(model, ("b", -0.5), ("a", 1.5))
    model.set_adapter("a")
    run(model)
    with model.disable_adapter():
        check_edit_by_itself(model)
    model.set_alpha(0.25)
    check_edit_by_itself(model, ("a", 0.25))
    run(model)
    with model.base_model.alpha_scale(2.0):
        check_edit_by_itself(model, ("a", 0.5))
        run(model)
    check_edit_by_itself(model, ("a", 0.25))
    run(model)
    with model.base_model.record_gates() as gates:
        check_edit_by_itself(model, ("a", 0.25))
        assert len(gates) == 1
    run(model)
    model.delete_adapter("b")
    model.delete_adapter("a")
    model.add_adapter("a", PSRConfig(positions="all", alpha=3.0))
    model.set_adapter("a")
    randomize(model, std=0.3)
    check_edit_by_itself(model, ("a", 3.0))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SteeringState) if field.init])
def test_whatever_is_set_is_a_reason_to_forget(name):
    state = SteeringState()
    state.remember("a", "a", 1.5)
    assert state.recall("a", torch.ones(1, 3, WIDTH)) == ("a", 1.5)
    assert state.recall("b", torch.ones(1, 3, WIDTH)) is None
    setattr(state, name, getattr(state, name))
    assert state.recall("a", torch.ones(1, 3, WIDTH)) is None


def test_an_adapter_configured_anew_is_a_reason_to_forget(model):
    state, hidden = model.base_model.model._psr_state, torch.ones(1, 3, WIDTH)
    layer = model.psr_layers()[2]
    layer(hidden)
    assert state.recall(layer.active_adapters, hidden) == ("a", 1.5)
    layer.configure("a", dataclasses.replace(layer.config["a"], alpha=0.5))
    assert state.recall(layer.active_adapters, hidden) is None
    check_edit_by_itself(model, ("a", 0.5))


def test_a_call_follows_the_strength_of_the_call(model):
    weights = weights_of(model, "a")
    for alpha in (1.5, 0.3, -1.0):
        logits = model(torch.tensor([IDS]), alpha=alpha).logits[0]
        torch.testing.assert_close(logits, naive_logits(tiny_model(), IDS, weights, [1], alpha), atol=1e-4, rtol=0)


def test_two_adapters_on_every_token_edit_every_layer(model):
    model.base_model.set_adapter(["a", "b"])
    weights = {}
    for layer in range(LAYERS):
        (w, b, z), (other_w, other_b, other_z) = (weights_of(model, name)[layer] for name in ALPHAS)
        strong = torch.cat([ALPHAS["a"] * z, ALPHAS["b"] * other_z])
        weights[layer] = torch.cat([w, other_w]), torch.cat([b, other_b]), strong
    expected = naive_logits(tiny_model(), IDS, weights, [1], 1.0)
    torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=0)


def test_an_adapter_of_some_layers_leaves_the_others_alone(model):
    model.add_adapter("c", PSRConfig(positions="all", layers_to_transform=[0, 2], init_weights=False))
    model.set_adapter("c")
    weights = weights_of(model, "c")
    torch.testing.assert_close(run(model), naive_logits(tiny_model(), IDS, weights, [1], 1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_every_layer_leaves_autocast(model, autocast, monkeypatch):
    seen, forward = [], PSRUnit.forward

    def look(unit, *args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(unit, *args)

    monkeypatch.setattr(PSRUnit, "forward", look)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        run(model)
    assert seen == [False] * LAYERS


def test_a_mask_is_for_the_tokens_of_its_call(model):
    ids = [9, 12, 17, 23]
    weights = weights_of(model, "a")
    for mask in ([0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]):
        logits = model(torch.tensor([ids]), steering_mask=torch.tensor([mask])).logits[0]
        torch.testing.assert_close(logits, naive_logits(tiny_model(), ids, weights, mask, 1.5), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"the steering mask can't be applied"):
        model.psr_layers()[2](torch.randn(1, 3, WIDTH))
    assert run(model).isfinite().all()
