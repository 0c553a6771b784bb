"""Traits trained apart: one adapter per row of a batch, and several combined into one."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from helpers.adapters import SEVERAL, several
from helpers.models import tiny_model
from peft import PeftModel, get_peft_model

from peft_psr import PSRConfig


IDS = torch.tensor([[1, 9, 12, 17, 23, 31], [1, 40, 8, 22, 5, 6], [1, 22, 35, 19, 7, 30], [1, 3, 50, 41, 13, 9]])


def many(positions=None):
    return several(adapters={a: {**SEVERAL[a], "positions": (positions or {}).get(a, "all")} for a in SEVERAL})


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
    with pytest.raises(ValueError, match="non-existing adapter.*: formal. There are: a, b, c"):
        model(IDS, adapter_names=["a", "formal", "b", "c"])
    with pytest.raises(ValueError, match="got 2 names and 4 rows"):
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


def test_active_together_edits_add_up_in_any_order_and_later_layers_see_all_of_them():
    model = many()
    names = ["a", "b", "c"]
    model.base_model.set_adapter(names)
    forth = model(IDS).logits
    model.base_model.set_adapter(names[::-1])
    torch.testing.assert_close(model(IDS).logits, forth, atol=1e-5, rtol=1e-5)

    # plain hooks: on each layer every gate reads the same stream, which carries all edits of the layers before
    def hook(module, args, output, units):
        edited = output
        for name, unit in units.items():
            config = model.peft_config[name]
            gates = (
                torch.ones(1) if unit.gate_weight is None else torch.relu(output @ unit.gate_weight.T + unit.gate_bias)
            )
            edited = edited + (config.alpha + config.coefficient_bias) * gates @ unit.direction
        return edited

    plain = tiny_model()
    for index, layer in model.psr_layers().items():
        plain.model.layers[index].register_forward_hook(
            lambda module, args, output, units=layer.psr_unit: hook(module, args, output, units)
        )
    torch.testing.assert_close(plain(IDS).logits, forth, atol=1e-4, rtol=1e-4)


def test_together_is_not_the_sum_of_each_alone_across_layers():
    model = many()
    hidden = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        hidden[name] = model(IDS, output_hidden_states=True).hidden_states
    with model.disable_adapter():
        base = model(IDS, output_hidden_states=True).hidden_states
    model.base_model.set_adapter(["a", "b"])
    both = model(IDS, output_hidden_states=True).hidden_states

    def missing(layer):
        summed = base[layer + 1] + sum(hidden[name][layer + 1] - base[layer + 1] for name in hidden)
        return ((both[layer + 1] - summed).norm() / (both[layer + 1] - base[layer + 1]).norm()).item()

    assert missing(0) < 1e-5  # only a edits layer 0
    assert missing(1) > 0.01  # here b's gates read what a did before


SAMPLES = [
    {"input_ids": torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)
]


def test_rank_cut_beats_dropping_ranks_and_reports_its_error(tmp_path):
    model = many()
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.5, -1.0], "exact")
    errors = model.add_weighted_adapter(
        ["a", "b", "c"], [1.0, 0.5, -1.0], "cut", combination_type="svd", svd_rank=2, samples=SAMPLES
    )
    assert list(errors) == [0, 1, 2, 3] and model.active_adapters == ["a"]
    assert model.peft_config["exact"].r == 5 and model.peft_config["cut"].r == 2
    model.set_adapter("exact")
    layers = model.psr_layers()
    inputs = {index: [] for index in layers}
    handles = [
        model.get_submodule(f"base_model.model.model.layers.{index}").register_forward_hook(
            lambda module, args, output, index=index: inputs[index].append(output), prepend=True
        )
        for index in layers
    ]
    for sample in SAMPLES:
        model(**sample)
    for handle in handles:
        handle.remove()
    for index, layer in layers.items():
        unit, cut = layer.unit("exact"), layer.unit("cut")
        held_out = torch.cat([hidden.flatten(0, 1) for hidden in inputs[index]])[1::2]
        edit = torch.relu(held_out @ unit.gate_weight.T + unit.gate_bias) @ unit.direction
        after = torch.relu(held_out @ cut.gate_weight.T + cut.gate_bias) @ cut.direction
        assert errors[index] == pytest.approx(((after - edit).norm() / edit.norm()).item(), abs=1e-4)
        power = (torch.relu(held_out @ unit.gate_weight.T + unit.gate_bias) * unit.direction.norm(dim=1)).norm(dim=0)
        keep = power.topk(2).indices
        dropped = torch.relu(held_out @ unit.gate_weight[keep].T + unit.gate_bias[keep]) @ unit.direction[keep]
        truncation = ((dropped - edit).norm() / edit.norm()).item()
        used = int(unit.direction.any(dim=1).sum())
        assert errors[index] < (1e-4 if used <= 2 else 0.8 * truncation)
    model.set_adapter("cut")
    logits = model(IDS).logits
    model.save_pretrained(tmp_path, selected_adapters=["cut"])
    assert torch.equal(PeftModel.from_pretrained(tiny_model(), tmp_path / "cut").eval()(IDS).logits, logits)


def test_rank_cut_is_exact_where_gates_are_alike():
    model = many()
    with torch.no_grad():
        first, second = (model.psr_layers()[1].unit(name) for name in "ab")
        second.gate_weight.copy_(first.gate_weight.expand(3, -1) * torch.tensor([[0.5], [1.0], [2.0]]))
        second.gate_bias.copy_(first.gate_bias.expand(3) * torch.tensor([0.5, 1.0, 2.0]))
    errors = model.add_weighted_adapter(
        ["a", "b"], [1.0, -2.0], "one", combination_type="svd", svd_rank=1, samples=SAMPLES
    )
    assert errors[1] < 1e-5 and errors[0] < 1e-5 < errors[3]


def test_rank_cut_looks_at_the_tokens_that_are_edited():
    model = many(dict.fromkeys("abc", "response"))
    labels = SAMPLES[0]["input_ids"].clone()
    labels[:, :12] = -100
    seen = {}
    layer = model.psr_layers()[1]
    with pytest.MonkeyPatch.context() as patch:
        count = lambda unit, hidden, r: seen.update({id(unit): len(hidden)}) or 1 / 0  # noqa: E731
        patch.setattr("peft_psr.combination.rank_cut.cut_rank", count)
        with pytest.raises(ZeroDivisionError):
            model.add_weighted_adapter(
                ["a", "b"], [1, 1], "x", "svd", svd_rank=1, samples=[{**SAMPLES[0], "labels": labels}]
            )
    assert set(seen.values()) == {6 * 9}  # the last prompt token and eight of the response
    assert "x" not in model.peft_config and "x" not in layer.psr_unit


def test_combination_mistakes_leave_the_model_as_it_was():
    model = many({"a": "response"})
    before = copy.deepcopy(list(model.peft_config))
    for arguments, message in [
        ((["a", "b"], [1.0, 1.0], "x"), "different positions"),
        ((["b", "formal"], [1.0, 1.0], "x"), "No adapter 'formal'"),
        ((["b", "c"], [1.0], "x"), "2 adapters and 1 weights"),
        ((["b", "c"], [1.0, 1.0], "a"), "'a' already"),
        ((["b", "c"], [1.0, float("nan")], "x"), "finite"),
        ((["b", "c"], [1.0, 1.0], "x", "linear"), "'cat' or 'svd'"),
        ((["b", "c"], [1.0, 1.0], "x", "svd"), "takes svd_rank and samples"),
        ((["b", "c"], [1.0, 1.0], "x", "cat", 1), "takes svd_rank and samples"),
        ((["b", "c"], [1.0, 1.0], "x", "svd", 0, SAMPLES), "at least 1, got 0"),
        ((["b", "c"], [1.0, 1.0], "x", "svd", 1, []), "samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == before


def test_an_adapter_taken_twice_counts_with_both_weights():
    model = many()
    model.add_weighted_adapter(["b", "b"], [1.0, -0.5], "less")
    model.set_adapter("b")
    config = model.peft_config["b"]
    config.alpha = 0.5 * (config.alpha + config.coefficient_bias) - config.coefficient_bias
    halved = model(IDS).logits
    model.set_adapter("less")
    torch.testing.assert_close(model(IDS).logits, halved, atol=1e-5, rtol=1e-4)


def test_adapters_of_one_configuration_have_strengths_of_their_own():
    config = PSRConfig()
    first, second = (get_peft_model(tiny_model(), config) for _ in range(2))
    first.add_adapter("b", config)
    first.set_alpha(3.0)
    assert first.peft_config["b"].alpha == 1.0 == second.peft_config["default"].alpha
    assert first.psr_layers()[0].config["default"].alpha == 3.0 and first.psr_layers()[0].config["b"].alpha == 1.0


def test_a_rank_is_not_cut_by_what_disabled_adapters_do():
    model = many()
    arguments = {"combination_type": "svd", "svd_rank": 1, "samples": SAMPLES}
    expected = model.add_weighted_adapter(["a", "b"], [1, 1], "x", **arguments)
    with model.alpha_scale(0.0):
        assert model.add_weighted_adapter(["a", "b"], [1, 1], "y", **arguments) == expected
    with model.disable_adapter(), pytest.raises(ValueError, match="Adapters are disabled"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "z", **arguments)
    assert "z" not in model.peft_config


def test_combining_in_inference_mode_leaves_a_trainable_adapter():
    model = many()
    with torch.inference_mode():
        model.add_weighted_adapter(["a", "b"], [1, 1], "x", "svd", svd_rank=2, samples=SAMPLES)
    model.set_adapter("x")
    model(IDS, labels=IDS).loss.backward()
    assert model.psr_layers()[1].unit("x").direction.grad.abs().max() > 0


def test_recorded_gates_of_rows_are_each_rows_own():
    model = many()
    with pytest.raises(ValueError, match="not at adapter_names"):
        model.gate_values(IDS, adapter_names=["a"] * 4)
    names = ["b", "__base__", "a", "b"]
    with model.record_gates() as gates, torch.no_grad():
        model(IDS, adapter_names=names)
    key, layer = next(iter(model.psr_layers().items()))
    for row, name in enumerate(names):
        got = gates[layer.name, "*"][row]
        if name == "__base__":
            assert not got.any()
            continue
        model.set_adapter(name)
        if name not in layer.psr_unit:
            assert not got.any()
            continue
        expected = model.gate_values(IDS)[key][row]
        torch.testing.assert_close(got[:, : expected.shape[-1]], expected)
        assert not got[:, expected.shape[-1] :].any()


def test_offloaded_weights_are_refused_where_they_are_gathered():
    model = many()
    accelerate.cpu_offload(model.get_base_model())
    with pytest.raises(ValueError, match="adapter_names needs the adapters' weights at hand"):
        model(IDS, adapter_names=["a"] * 4)
    with pytest.raises(ValueError, match="add_weighted_adapter needs the adapters' weights at hand"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "x")
    assert "x" not in model.peft_config
