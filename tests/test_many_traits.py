"""Traits trained apart: one adapter per row of a batch, and several combined into one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model

from peft_psr import PSRConfig


IDS = torch.tensor([[1, 9, 12, 17, 23, 31], [1, 40, 8, 22, 5, 6], [1, 22, 35, 19, 7, 30], [1, 3, 50, 41, 13, 9]])
CONFIGS = {
    "a": {"layers_to_transform": [0, 1], "r": 1, "alpha": 1.5},
    "b": {"layers_to_transform": [1, 3], "r": 3, "coefficient_bias": -0.3},
    "c": {"gate": "constant", "alpha": -0.5},
}


def many(positions=None):
    """A model with adapters a, b and c of unlike ranks, layers, gates and strengths."""
    model = None
    for seed, (name, settings) in enumerate(CONFIGS.items()):
        config = PSRConfig(**settings, positions=(positions or {}).get(name, "all"))
        if model is None:
            model = get_peft_model(tiny_model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if f"psr_unit.{name}." in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("positions", [None, {"a": "response", "b": "all", "c": "question_and_response"}])
def test_each_row_is_what_its_adapter_does_alone(positions):
    model = many(positions)
    names = ["b", "__base__", "c", "a"]
    mixed = model(IDS, adapter_names=names).logits
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = model.generate(input_ids=IDS, adapter_names=names, **settings)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(IDS[row : row + 1]).logits
                text = model.generate(input_ids=IDS[row : row + 1], **settings)
        else:
            model.set_adapter(name)
            alone = model(IDS[row : row + 1]).logits
            text = model.generate(input_ids=IDS[row : row + 1], **settings)
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(generated[row], text[0])


def test_rows_with_strengths_beams_and_return_sequences():
    model = many()
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "num_beams": 3,
        "num_return_sequences": 2,
    }
    mixed = model.generate(input_ids=IDS[:2], adapter_names=["b", "a"], alpha=[0.5, 2.0], **settings)
    for row, (name, alpha) in enumerate([("b", 0.5), ("a", 2.0)]):
        model.set_adapter(name)
        alone = model.generate(input_ids=IDS[row : row + 1], alpha=alpha, **settings)
        assert torch.equal(mixed[2 * row : 2 * row + 2], alone)


def test_rows_carry_gradients():
    model = many()
    model.base_model.set_adapter(["a", "b"])
    model(IDS, adapter_names=["a", "b", "a", "__base__"], labels=IDS).loss.backward()
    layer = model.psr_layers()[1]
    assert layer.unit("a").direction.grad.abs().max() > 0 and layer.unit("b").direction.grad.abs().max() > 0
    assert model.psr_layers()[0].unit("c").direction.grad is None


def test_row_mistakes():
    model = many()
    with pytest.raises(ValueError, match="No adapter 'formal'; there are: a, b, c"):
        model(IDS, adapter_names=["a", "formal", "b", "c"])
    with pytest.raises(ValueError, match="4 rows, 2 names"):
        model.generate(input_ids=IDS, adapter_names=["a", "b"])
    model.set_adapter("a")
    assert torch.equal(model(IDS, adapter_names=["a"] * 4).logits, model(IDS, adapter_names=["a"] * 4).logits)


@pytest.mark.parametrize(
    ("names", "weights"), [(["a", "b"], [1.0, -0.5]), (["a", "b", "c"], [0.3, 1.0, 2.0]), (["c"], [1.0])]
)
def test_combination_is_exact_and_saved_as_an_ordinary_adapter(names, weights, tmp_path):
    model = many()
    model.add_weighted_adapter(names, weights, "both", combination_type="cat")
    alphas = {name: model.peft_config[name].alpha for name in names}
    for name, weight in zip(names, weights, strict=True):  # weight * (alpha + b_m), spelled as a strength
        config = model.peft_config[name]
        config.alpha = weight * (config.alpha + config.coefficient_bias) - config.coefficient_bias
    model.base_model.set_adapter(names)
    together = model(IDS).logits
    for name, alpha in alphas.items():
        model.peft_config[name].alpha = alpha
    model.set_adapter("both")
    combined = model(IDS).logits
    torch.testing.assert_close(combined, together, atol=1e-4, rtol=1e-4)

    model.save_pretrained(tmp_path, selected_adapters=["both"])
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "both").eval()
    assert torch.equal(reloaded(IDS).logits, combined)


def test_order_does_not_matter_on_one_layer():
    model = many()
    for name in "ab":
        assert 1 in CONFIGS[name]["layers_to_transform"]
    model.base_model.set_adapter(["a", "b"])
    forth = model(IDS).logits
    model.base_model.set_adapter(["b", "a"])
    torch.testing.assert_close(model(IDS).logits, forth, atol=1e-5, rtol=1e-5)


def test_combination_mistakes_leave_the_model_as_it_was():
    model = many({"a": "response"})
    before = copy.deepcopy(list(model.peft_config))
    for arguments, message in [
        ((["a", "b"], [1.0, 1.0], "x"), "different positions"),
        ((["b", "formal"], [1.0, 1.0], "x"), "No adapter 'formal'"),
        ((["b", "c"], [1.0], "x"), "2 adapters and 1 weights"),
        ((["b", "c"], [1.0, 1.0], "a"), "'a' already"),
        ((["b", "c"], [1.0, float("nan")], "x"), "finite"),
        ((["b", "c"], [1.0, 1.0], "x", "svd"), "'cat'"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == before
