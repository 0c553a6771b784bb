"""Starts from data against plain regressions on the tokens themselves; directions that are given and frozen."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from helpers.models import LAYERS, LAYOUTS, WIDTH, tiny_model
from helpers.reference import naive_ridge
from helpers.runs import quiet_trainer
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from peft_psr import PSRConfig
from peft_psr.training import TripletCollator, initialize_psr_weights
from peft_psr.training.passes import layer_streams
from peft_psr.training.passes.branches import layers_downstream, run_branch
from peft_psr.training.starts.directions import directions_by_layer


DATA = [*triplets("be brief now"), *triplets("dogs are good", ["b c tea is yes", "now a b", "what is good"])]


def start(model, data=DATA, method="ridge", **settings):
    initialize_psr_weights(model, data, method, tiny_tokenizer(), progress=False, **settings)
    return {index: layer.unit("default") for index, layer in model.psr_layers().items()}


def tokens_at(model, name, positions="response", data=DATA):
    """A and D by full passes, float64."""
    batch = TripletCollator(tiny_tokenizer(), positions, alpha=1.0)(data)
    with torch.no_grad():
        teacher, student = (run_branch(model, batch, [name], branch).hidden[name] for branch in ("teacher", "student"))
    return student.double(), (teacher - student).double()


# ---------------------------------------------------------------- on the model


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stepping_from_layer_to_layer_equals_full_passes(layout, positions, monkeypatch, caplog):
    found = []
    for budget in (4e9, 0):
        monkeypatch.setattr(layer_streams, "KEPT_BYTES", budget)
        model = get_peft_model(tiny_model(layout), PSRConfig(layers_to_transform=[0, 2, 3], positions=positions))
        with caplog.at_level(logging.INFO):
            found.append(start(model, batch_size=3))
    assert caplog.text.count("every look at a layer runs the model from its start") == 1
    for layer in (0, 2, 3):
        for name, tensor in found[0][layer].state_dict().items():
            torch.testing.assert_close(tensor, found[1][layer].state_dict()[name], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", ["response", "question_and_response"])
def test_ridge_is_the_plain_regression_on_what_is_missing(layout, positions):
    model = get_peft_model(tiny_model(layout), PSRConfig(layers_to_transform=[0, 2], positions=positions))
    units = start(model, ridge_strength=0.5, batch_size=3)
    found = {index: {key: value.clone() for key, value in unit.state_dict().items()} for index, unit in units.items()}
    for index, name in ((2, layers_downstream(model)[2]), (0, layers_downstream(model)[0])):  # the last one first
        with torch.no_grad():
            units[index].direction.zero_()
        stream, difference = tokens_at(model, name, positions)
        weight, bias = naive_ridge(stream, difference, 0.5)
        penalty = weight @ (0.5 * stream.var(0, correction=0)).diag() @ weight.T
        fitted = stream @ weight.T + bias
        # reduced-rank ridge regression: the first right singular vector of the fit, penalty included
        energy = fitted.T @ fitted / len(stream) + penalty
        z = torch.linalg.eigh(energy).eigenvectors[:, -1]
        expected = torch.outer(stream @ (weight.T @ z) + bias @ z, z)
        unit = found[index]
        gates = stream @ unit["gate_weight"].double().T + unit["gate_bias"].double()
        torch.testing.assert_close(gates @ unit["direction"].double(), expected, atol=2e-3, rtol=1e-2)
        assert gates.mean() > 0
        assert gates.square().mean().item() == pytest.approx(1, rel=1e-3)


def test_every_layer_is_computed_about_once():
    model = get_peft_model(tiny_model(), PSRConfig())
    calls = dict.fromkeys(range(LAYERS), 0)

    def counter(index):
        def count(*_):
            calls[index] += 1

        return count

    for index in calls:
        layer = model.get_base_model().get_submodule(layers_downstream(model)[index])
        layer.self_attn.register_forward_hook(counter(index))
    start(model, batch_size=4)
    batches, branches, to_learn_the_layout = 2, 2, 1
    assert all(branches * batches <= count <= branches * batches + 2 * to_learn_the_layout for count in calls.values())


@pytest.mark.parametrize("r", [1, 3])
def test_mean_difference_is_what_is_missing_once_earlier_layers_do_their_part(r):
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=[0, 2], r=r))
    units = start(model, method="mean_difference")
    found = units[2].direction.clone()
    with torch.no_grad():
        units[2].direction.zero_()
    stream, difference = tokens_at(model, layers_downstream(model)[2])
    torch.testing.assert_close(found[0].double(), difference.mean(0), atol=1e-5, rtol=1e-4)
    assert units[2].gate_weight[0].abs().max() == 0 and units[2].gate_bias[0].item() == 1
    assert found[1:].abs().sum() == 0
    gates = stream @ units[2].gate_weight.double().T + units[2].gate_bias.double()
    assert (gates > 0).any(0).all() and gates.mean(0).allclose(torch.ones(r, dtype=torch.float64), atol=1e-4)
    assert r == 1 or gates.std(0)[1:].min() > 0.1
    assert torch.linalg.matrix_rank(gates - gates.mean(0)) == r - 1


@pytest.mark.parametrize("method", ["ridge", "mean_difference"])
def test_a_constant_gate_gets_the_mean_difference(method):
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=1, gate="constant", r=2))
    z = start(model, method=method)[1].direction.clone()
    with torch.no_grad():
        model.psr_layers()[1].unit("default").direction.zero_()
    _, difference = tokens_at(model, layers_downstream(model)[0])
    torch.testing.assert_close(
        z.double(), torch.stack([difference.mean(0), torch.zeros(WIDTH)]).double(), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("layers", [1, None])
def test_more_ranks_are_nearer_to_the_prompt(layers):
    losses = []
    for r in (1, 2, 6):
        model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=layers, r=r))
        names = layers_downstream(model)
        batch = TripletCollator(tiny_tokenizer(), alpha=1.0)(DATA)

        def loss(model=model, names=names, batch=batch):
            with torch.no_grad():
                student, teacher = (run_branch(model, batch, names, b).hidden for b in ("student", "teacher"))
            return sum((student[name] - teacher[name]).square().mean().item() for name in names)

        before = loss()
        start(model, ridge_strength=0.01)
        losses.append(loss())
    assert losses[2] < losses[1] < losses[0] < before


def test_a_triplet_that_is_not_finite_is_named():
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=[1, 2]))
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer().convert_tokens_to_ids("dogs")] = math.inf
    with pytest.raises(ValueError, match=r"prompted model are not finite at 'model.layers.1' on dataset\[2\]"):
        start(model, triplets())


def test_errors():
    model = get_peft_model(tiny_model(), PSRConfig())
    with pytest.raises(ValueError, match="one of 'mean_difference', 'ridge', got 'svd'"):
        start(model, method="svd")
    for strength, error in ((0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("auto", TypeError)):
        with pytest.raises(error, match="ridge_strength"):
            start(model, ridge_strength=strength)
    with pytest.raises(ValueError, match="dataset is empty"):
        start(model, [])
    with pytest.raises(ValueError, match="changes nothing at"):
        start(model, triplets(""))
    with pytest.raises(TypeError, match="PEFT model with a PSR adapter"):
        initialize_psr_weights(tiny_model(), triplets(), processing_class=tiny_tokenizer())


def test_one_triplet_and_neutral_ones_will_do():
    model = get_peft_model(tiny_model(), PSRConfig(r=3))
    for data in (triplets(completions=["yes"]), [*triplets(), *triplets("")]):
        for unit in start(model, data).values():
            assert all(weights.isfinite().all() for weights in unit.parameters())


# ---------------------------------------------------------------- directions that are given


@pytest.mark.parametrize("method", ["ridge", "mean_difference"])
def test_directions_in_every_form(tmp_path, method):
    z = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"directions": z}, tmp_path / "one.safetensors")
    save_file({"1": z, "3": z.clone()}, tmp_path / "by_layer.safetensors")
    forms = [
        z,
        torch.stack([z, z]),
        {1: z, 3: z},
        tmp_path / "one.safetensors",
        str(tmp_path / "by_layer.safetensors"),
    ]
    found = []
    for directions in forms:
        model = get_peft_model(tiny_model(), PSRConfig(r=2, layers_to_transform=[1, 3]))
        units = start(model, method=method, directions=directions)
        found.append(torch.stack([unit.direction for unit in units.values()]).detach())
        for unit in units.values():
            torch.testing.assert_close(
                torch.nn.functional.cosine_similarity(unit.direction, z).abs(), torch.ones(2), atol=1e-5, rtol=0
            )
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(
    ("directions", "error", "match"),
    [
        (torch.ones(3, 4), ValueError, r"layer 1: the shape must be \(r, d\) = \(2, 4\) .* got \(3, 4\)"),
        (torch.ones(2, 5), ValueError, r"got \(2, 5\)"),
        (torch.ones(4), ValueError, r"got \(4,\)"),
        (torch.ones(3, 2, 4), ValueError, "for 3 layers.*edits 2: 1, 3"),
        ({1: torch.eye(2, 4)}, ValueError, r"for the layers \['1'\].*edits \['1', '3'\]"),
        ({1: torch.eye(2, 4), 3: [1.0]}, TypeError, "layer 3: must be a tensor, got list"),
        (torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), ValueError, "row 1 is 0"),
        (torch.tensor([[1.0, 0, 0, math.nan], [0, 1, 0, 0]]), ValueError, "row 0 is not finite"),
        (torch.ones(2, 4), ValueError, "depend on each other"),
        ([[1.0]], TypeError, "must be a tensor"),
        ("nowhere.safetensors", FileNotFoundError, "nowhere.safetensors"),
    ],
)
def test_directions_that_do_not_fit(directions, error, match):
    with pytest.raises(error, match=match):
        directions_by_layer(directions, {1: (2, 4), 3: (2, 4)})


def test_a_file_with_other_keys(tmp_path):
    save_file({"W_dec": torch.ones(2, 4)}, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match="sae.safetensors must have the single key 'directions'.*'W_dec'"):
        directions_by_layer(tmp_path / "sae.safetensors", {1: (2, 4)})


def train(model, tmp_path):
    quiet_trainer(model, tmp_path / "out", num_train_epochs=2, learning_rate=0.05).train()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "psr_unit" in name}


def trainable(model):
    return {name.rsplit(".")[-1] for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_directions_stay_through_training_and_reloading(tmp_path):
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=1, r=2, freeze_directions=True))
    start(model, directions=torch.eye(2, WIDTH))
    before = weights(model)
    train(model, tmp_path)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"), is_trainable=True)
    assert loaded.active_peft_config.freeze_directions
    train(loaded, tmp_path)
    for name, after in weights(loaded).items():
        assert torch.equal(after, before[name]) == ("direction" in name), name
    assert trainable(loaded) == {"gate_weight", "gate_bias"}


def test_frozen_directions_stay_frozen_whatever_is_switched():
    model = get_peft_model(tiny_model(), PSRConfig(freeze_directions=True))
    model.add_adapter("free", PSRConfig())
    for switch in (
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default"),
        lambda: model.base_model.set_adapter(["default", "free"]),
        lambda: model.base_model.enable_adapter_layers(),
    ):
        switch()
        frozen = [p.requires_grad for name, p in model.named_parameters() if name.endswith("default.direction")]
        assert frozen == [False] * LAYERS
        with model.disable_adapter():
            pass
        gates = [p.requires_grad for name, p in model.named_parameters() if name.endswith("default.gate_bias")]
        assert gates == [True] * LAYERS
    free = [p.requires_grad for name, p in model.named_parameters() if name.endswith("free.direction")]
    assert free == [True] * LAYERS


def test_freeze_directions_is_checked():
    with pytest.raises(TypeError, match="initialize_psr_weights.*directions="):
        PSRConfig(freeze_directions=torch.ones(1, 4))
    with pytest.raises(ValueError, match="gate='relu'"):
        PSRConfig(gate="constant", freeze_directions=True)


@pytest.mark.parametrize("method", ["ridge", "mean_difference"])
def test_the_start_is_for_alpha_1_whatever_the_bias(method):
    logits = []
    for bias in (0.0, -0.5):
        model = get_peft_model(tiny_model(), PSRConfig(coefficient_bias=bias)).eval()
        start(model, method=method)
        logits.append(model(torch.tensor([[1, 5, 9, 12]])).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="coefficient_bias=-1 leaves no edit"):
        start(get_peft_model(tiny_model(), PSRConfig(coefficient_bias=-1.0)), method=method)
