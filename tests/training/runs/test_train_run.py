"""Runs of `psr train`: what goes in, what comes out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from helpers.models import tiny_model
from helpers.runs import INSTRUCTIONS, PROMPTS, STOPS_EARLY, assert_same, rows, weights, write
from helpers.tokenizers import tiny_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel

from peft_psr import PSRConfig
from peft_psr.training import PSRTrainer, PSRTrainingArguments, initialize_psr_weights
from peft_psr.training.data.by_trait import hold_out, read_traits
from peft_psr.training.data.draws import template_hash
from peft_psr.training.runs.train import run as train_run
from peft_psr.training.runs.train.assembly import make_arguments
from peft_psr.training.runs.train.recipe import TrainRecipe
from peft_psr.training.runs.train.run import TrainRun


# ---------------------------------------------------------------- what comes out


def test_each_trait_has_an_ordinary_adapter_folder(tmp_path, recipe):
    used = recipe(start="ridge", eval_share=0.2, layers_to_transform=(1, 2), r=2)
    summaries = TrainRun(tmp_path / "out", used).run()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"brief", "kind", "run.json", ".lock"}
    for trait in ("brief", "kind"):
        folder = tmp_path / "out" / trait
        assert {path.name for path in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
            "psr_facts.json",
            "summary.json",
            "recipe.yaml",
        }
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert isinstance(model, PeftModel) and set(model.psr_layers()) == {1, 2}
        summary = json.loads((folder / "summary.json").read_text())
        assert summary == summaries[trait]
        assert (summary["triplets"], summary["held_out"], summary["steps"]) == (12, 3, 9)
        assert summary["loss"] > 0 and summary["eval_loss"] > 0 and summary["start_seconds"] > 0
        card = (folder / "README.md").read_text()
        assert INSTRUCTIONS[trait] in card and "12" in card and "start: ridge" in card
        again = TrainRecipe(**yaml.safe_load((folder / "recipe.yaml").read_text()))
        assert again == used.model_copy(update={"traits": (trait,)})


def test_the_held_out_loss_is_that_of_the_saved_adapter(tmp_path, recipe):
    used = recipe(eval_share=0.4, traits=("brief",), alpha=1.0)
    run = TrainRun(tmp_path / "out", used)
    summary = run.run()["brief"]
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "out" / "brief", is_trainable=True)
    arguments = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, alpha=1.0)
    trainer = PSRTrainer(model, arguments, run.train["brief"], run.held_out["brief"], tiny_tokenizer())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-4)


def test_parallel_equals_one_after_another(tmp_path, recipe):
    summaries = {}
    for parallel in (False, True):
        used = recipe(parallel=parallel, checkpoint_steps=100, start="linear", eval_share=0.2)
        summaries[parallel] = TrainRun(tmp_path / str(parallel), used).run()
    assert_same(tmp_path / "False", tmp_path / "True", atol=1e-5)
    assert summaries[True]["brief"]["trained_with"] == ["kind"]
    for name, alone in summaries[False].items():
        assert summaries[True][name]["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("start", ["live", "linear", "mean_difference", "ridge"])
def test_starts(tmp_path, recipe, start):
    run = TrainRun(tmp_path, recipe(start=start, traits="kind", learning_rate=1e-12, epochs=1))
    run.run()
    found = weights(tmp_path / "kind")
    biases = torch.cat([values for name, values in found.items() if name.endswith("gate_bias")])
    directions = torch.stack([values for name, values in found.items() if name.endswith("direction")])
    if start == "live":
        assert torch.allclose(biases, torch.ones(4)) and directions.abs().max() < 1e-6
    elif start == "linear":
        assert biases.abs().max() < 1 and directions.abs().max() > 0.01 and biases.std() > 0
    else:
        from peft import get_peft_model

        model = get_peft_model(tiny_model(), PSRConfig())
        initialize_psr_weights(model, run.train["kind"], start, processing_class=tiny_tokenizer(), progress=False)
        expected = torch.stack([layer.unit("default").direction for layer in model.psr_layers().values()])
        torch.testing.assert_close(directions, expected, atol=1e-5, rtol=1e-4)


def test_every_setting_reaches_the_trainer(tmp_path, recipe):
    settings = {"objective": {"mse": 1.0, "ll": 0.5}, "normalize_loss": "layer", "regularizer": 0.1, "alpha": 0.5,
                "neutral_weight": 2.0, "norm_penalty": 0.3, "teacher_cache": "none", "learning_rate": 0.5,
                "gradient_accumulation_steps": 3}  # fmt: skip
    made = make_arguments(recipe(**settings, epochs=2.5, batch_size=6, seed=5), tmp_path)
    assert {name: getattr(made, name) for name in settings} == settings
    assert (made.num_train_epochs, made.per_device_train_batch_size, made.seed, made.data_seed) == (2.5, 6, 5, 5)
    assert make_arguments(recipe(bf16=True), tmp_path).bf16


def test_defaults_are_the_librarys(tmp_path):
    made = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    recipe = TrainRecipe(model="m", triplets="t")
    for name in ("objective", "normalize_loss", "regularizer", "alpha", "neutral_weight", "norm_penalty",
                 "teacher_cache", "learning_rate", "gradient_accumulation_steps"):  # fmt: skip
        assert getattr(recipe, name) == getattr(made, name)
    assert (recipe.batch_size, recipe.seed) == (made.per_device_train_batch_size, made.data_seed)
    config = PSRConfig()
    assert all(getattr(recipe, name) == getattr(config, name) for name in ("r", "gate", "positions"))
    assert (recipe.start == "live") is config.init_weights and recipe.layers_to_transform is None


# ---------------------------------------------------------------- options of the Trainer


def test_early_stopping_takes_the_best_weights(tmp_path, recipe):
    summary = TrainRun(tmp_path, recipe(**STOPS_EARLY, keep_checkpoints=True)).run()["kind"]
    assert summary["steps"] < STOPS_EARLY["epochs"] * 3
    states = [
        json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/kind/checkpoint-*/trainer_state.json")
    ]
    last = max(states, key=lambda state: state["global_step"])
    losses = [entry["eval_loss"] for entry in last["log_history"] if "eval_loss" in entry]
    assert summary["eval_loss"] == min(losses) < losses[-1] and losses.index(min(losses)) == len(losses) - 3
    best = Path(last["best_model_checkpoint"])
    assert all(torch.equal(values, weights(best)[name]) for name, values in weights(tmp_path / "kind").items())


def test_tensorboard(tmp_path, recipe, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TrainRun(tmp_path, recipe(traits="kind", report_to="tensorboard", eval_share=0.2)).run()
    events = EventAccumulator(str(tmp_path / "logs" / "kind")).Reload()
    shown = events.Tags()["scalars"]
    assert {"train/loss", "train/live_gates", "train/mse/layer_0", "eval/loss"} <= set(shown)
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6, 9]


def test_tensorboard_missing(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(train_run, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TrainRun(tmp_path, recipe(report_to="tensorboard")).check()


# ---------------------------------------------------------------- triplets


def test_held_out_prompts_are_in_no_training_triplet():
    triplets = rows("brief")
    for share, count in ((0.01, 1), (0.2, 1), (0.5, 2), (0.79, 4)):
        train, held_out = hold_out(triplets, share, 0, "brief")
        asked = [{row["prompt"][0]["content"] for row in side} for side in (train, held_out)]
        assert asked[0] | asked[1] == set(PROMPTS) and not asked[0] & asked[1] and len(asked[1]) == count
        assert sorted(map(json.dumps, train + held_out)) == sorted(map(json.dumps, triplets))
    assert hold_out(triplets, 0.2, 0, "brief") == hold_out(triplets, 0.2, 0, "brief")
    assert len({json.dumps(hold_out(triplets, 0.2, seed, "brief")[1]) for seed in range(10)}) > 1
    assert hold_out(triplets, 0.0, 0, "brief") == (triplets, [])
    with pytest.raises(ValueError, match="'brief' has 1 prompt.*eval_share: 0"):
        hold_out(rows("brief", PROMPTS[:1]), 0.1, 0, "brief")


def test_where_triplets_come_from(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    write(run / "completions.jsonl", {"id": 1})
    with pytest.raises(ValueError, match="not finished"):
        read_traits(run)
    write(run / "triplets.jsonl", *rows("kind"), *rows("brief"))
    assert list(read_traits(run)) == ["kind", "brief"] and list(read_traits(run, ["brief"])) == ["brief"]
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no triplets.jsonl"):
        read_traits(own)
    bare = [{name: value for name, value in row.items() if name != "trait"} for row in rows("kind")]
    write(own / "gentle.jsonl", *bare)
    write(own / "negatives.jsonl", {"not": "read"})
    assert list(read_traits(own)) == ["gentle"] == list(read_traits(own / "gentle.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_traits(tmp_path / "gone")
    with pytest.raises(ValueError, match="has no 'rude'; there are: brief, kind"):
        read_traits(run, ["rude", "kind"])
    write(own / "gentle.jsonl", *rows("kind", trait="a:b"), *rows("kind", trait="a b"))
    with pytest.raises(ValueError, match="'a:b' and 'a b' would share the folder a_b"):
        read_traits(own)


@pytest.mark.parametrize(
    ("triplet", "settings", "message"),
    [
        ({}, {"triplets_model": None}, "drawn from 'base'.*Train --model base.*--triplets-model base"),
        ({"template_hash": "0123"}, {}, r"another chat template \(0123\).*--revision"),
        ({"completion": ""}, {}, "line 1: completion missing or empty"),
        ({"trait_score": None}, {}, "brief.*trait_score"),
    ],
)
def test_triplets_that_do_not_fit(tmp_path, recipe, triplet, settings, message):
    source = write(tmp_path / "triplets.jsonl", *rows("brief", **triplet))
    with pytest.raises(ValueError, match=message):
        TrainRun(tmp_path / "out", recipe(triplets=str(source), **settings)).check()
    assert not (tmp_path / "out").exists()


def test_triplets_of_the_model_itself_need_no_more_words(tmp_path, recipe, made):
    fields = {"model": str(made / "base") + "/", "template_hash": template_hash(tiny_tokenizer().chat_template)}
    source = write(tmp_path / "triplets.jsonl", *rows("brief", **fields))
    (plan,) = TrainRun(tmp_path / "out", recipe(triplets=str(source), triplets_model=None)).check()
    assert (plan.train, plan.held_out, plan.steps, plan.finished) == (15, 0, 12, False)


# ---------------------------------------------------------------- the folder


def test_another_run_in_the_folder_is_refused(tmp_path, recipe):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no run of psr train"):
        TrainRun(tmp_path / "other", recipe()).check()
    (tmp_path / "other" / "run.json").write_text('{"fixed": {}, "plan_hash": "0"}')
    with pytest.raises(FileExistsError, match="holds no run of psr train"):
        TrainRun(tmp_path / "other", recipe()).check()
    out = tmp_path / "out"
    TrainRun(out, recipe(traits="kind", epochs=1)).run()
    with pytest.raises(ValueError, match=r"another recipe \(epochs: 1.0 -> 2.0, r: 1 -> 2\)"):
        TrainRun(out, recipe(traits="kind", epochs=2, r=2)).run()
    changed = write(tmp_path / "changed.jsonl", *rows("kind")[1:])
    with pytest.raises(ValueError, match="triplets of 'kind' are not those"):
        TrainRun(out, recipe(triplets=str(changed), epochs=1)).run()
    (out / "brief").mkdir()
    with pytest.raises(FileExistsError, match="brief is in the way"):
        TrainRun(out, recipe(epochs=1)).run()
    with FileLock(out / ".lock"), pytest.raises(BlockingIOError, match="Another process is at work"):
        TrainRun(out, recipe(traits="kind", epochs=1)).run()
