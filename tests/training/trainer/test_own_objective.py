"""An objective and a start of the user's own, through the registries: the trainer, a recipe, `psr train`."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import yaml
from helpers.adapters import randomize
from helpers.commands import psr
from helpers.models import LAYERS, tiny_model
from helpers.runs import make_files, make_recipe, quiet_trainer, trained, weights
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import SIX, triplets
from peft import get_peft_model

from peft_psr import PSRConfig
from peft_psr.files import read_json
from peft_psr.training import PSRTrainingArguments, initialize_psr_weights
from peft_psr.training.objectives.objective import Objective
from peft_psr.training.objectives.registry import OBJECTIVES
from peft_psr.training.objectives.tokens import row_means, rows_of
from peft_psr.training.runs.train.recipe import TrainRecipe
from peft_psr.training.runs.train.run import TrainRun
from peft_psr.training.starts.mean_difference import MEAN_DIFFERENCE
from peft_psr.training.starts.registry import STARTS
from peft_psr.training.starts.start import DataStart
from peft_psr.training.trainer.arguments import learns_from_text


class Cosine(Objective):
    """1 - cosine of the last layer's activations."""

    epochs = 2.0
    layers = "last"

    def loss(self, passes):
        """One minus the cosine."""
        last = passes.layers[-1]
        steered, prompted = passes.student.hidden[last].float(), passes.teacher[last].float()
        return row_means(
            1 - torch.cosine_similarity(steered, prompted, dim=-1), rows_of(passes.mask), len(passes.mask)
        )


class Absolute(Objective):
    """Mean absolute difference at each layer."""

    layers = "all"

    def loss(self, passes):
        """At each layer."""
        rows, count = rows_of(passes.mask), len(passes.mask)
        return {
            name: row_means((hidden - passes.teacher[name]).abs().mean(dim=-1), rows, count)
            for name, hidden in passes.student.hidden.items()
        }


class Halfway(DataStart):
    """Half the mean difference."""

    def edit(self, folds, wanted):
        """Its direction by half."""
        whole = MEAN_DIFFERENCE.edit(folds, wanted)
        return whole._replace(direction=whole.direction / 2)


@contextmanager
def added(registry, **entries):
    for name, entry in entries.items():
        registry.add(name, entry)
    try:
        yield
    finally:
        for name in entries:
            registry.remove(name)


@pytest.fixture
def own():
    with added(OBJECTIVES, cosine=Cosine(), absolute=Absolute()), added(STARTS, halfway=Halfway()):
        yield


def test_an_own_objective_trains_an_adapter(own, tmp_path):
    before, _ = trained(tiny_model(), tmp_path, objective="cosine", num_train_epochs=1, learning_rate=0.0)
    after, made = trained(tiny_model(), tmp_path, objective="cosine", num_train_epochs=8)
    assert any((one != other).any() for one, other in zip(before, after, strict=True))
    losses = [entry["cosine"] for entry in made.state.log_history if "cosine" in entry]
    assert sum(losses[-3:]) < sum(losses[:3]) and set(made.summary.losses) == {"cosine"}
    assert PSRTrainingArguments(output_dir=str(tmp_path), objective="cosine", use_cpu=True).num_train_epochs == 2


def test_it_is_weighed_beside_others_and_looks_at_what_it_says(own, tmp_path):
    model = get_peft_model(tiny_model(), PSRConfig())
    randomize(model, ".direction", seed=1, std=0.1)

    def loss(objective):
        made = quiet_trainer(model, tmp_path, objective=objective)
        value = made.compute_loss(model, made.data_collator(triplets())).item()
        return value, made._frozen.teacher_layers

    (cosine, last), (mse, everywhere), (both, needed) = map(loss, ("cosine", "mse", {"mse": 2.0, "cosine": 3.0}))
    assert both == pytest.approx(2 * mse + 3 * cosine, rel=1e-5)
    assert (len(last), len(everywhere), len(needed)) == (1, LAYERS, LAYERS)


def test_a_loss_at_each_layer_is_normalised_and_logged(own, tmp_path):
    _, plain = trained(tiny_model(), tmp_path, objective="absolute", learning_rate=0.0)
    _, made = trained(tiny_model(), tmp_path, objective="absolute", normalize_loss="global")
    assert set(made.normalizers) == {"absolute"} and len(made.normalizers["absolute"]) == LAYERS
    assert set(made.summary.loss_by_layer) == set(map(str, range(LAYERS)))
    assert {f"absolute/layer_{i}" for i in range(LAYERS)} <= set(made.state.log_history[0])
    assert plain.summary.losses["absolute"] == pytest.approx(sum(plain.summary.loss_by_layer.values()), rel=1e-5)


def test_recipes_take_both_and_name_them(own, tmp_path):
    made = make_files(tmp_path)
    recipe = make_recipe(made, objective="cosine", start="halfway", epochs=None, traits="brief")
    TrainRun(tmp_path / "run", recipe).run()
    summary = read_json(tmp_path / "run" / "brief" / "summary.json")
    assert summary["steps"] == 2 * 4 and set(summary["losses"]) == {"cosine"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe.model_dump(mode="json"), "objective": {"mse": 1.0, "cosine": 2.0}}))
    done = psr("train", file, "--output", tmp_path / "again", "--start", "halfway")
    assert done.exit_code == 0, done.output
    assert set(read_json(tmp_path / "again" / "brief" / "summary.json")["losses"]) == {"mse", "cosine"}
    assert set(weights(tmp_path / "again" / "brief")) == set(weights(tmp_path / "run" / "brief"))
    done = psr("train", file, "--output", tmp_path / "other", "--objective", '{"cosin": 1}')
    assert done.exit_code == 2 and "mse | ll | kl | cosine | absolute | a JSON object" in done.output


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no objective 'cosine'; there are: mse, ll, kl"):
        PSRTrainingArguments(output_dir="none", objective="cosine")
    for field in ("objective", "start"):
        with pytest.raises(ValueError, match="there are: "):
            TrainRecipe(model="a", triplets="b", **{field: "cosine"})


def test_an_own_start_sets_the_weights(own):
    directions = []
    for method in ("mean_difference", "halfway"):
        model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=[1]))
        initialize_psr_weights(model, SIX, method, tiny_tokenizer(), progress=False)
        directions.append(model.psr_layers()[1].unit("default").direction)
    torch.testing.assert_close(directions[0], 2 * directions[1])
    with pytest.raises(ValueError, match="one of 'mean_difference', 'ridge', 'halfway', got 'live'"):
        initialize_psr_weights(model, SIX, "live", tiny_tokenizer())


def test_what_learns_from_the_text_alone_has_the_benchmarks_passes_over_text(own):
    found = [learns_from_text(objective) for objective in ("ll", "mse", "kl", "cosine", {"ll": 1.0, "cosine": 1.0})]
    assert found == [True, False, False, False, False]
