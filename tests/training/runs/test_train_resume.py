"""Runs of `psr train` that are killed: started again, they give the adapters of a run that was never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.runs import STOPS_EARLY, assert_same
from transformers import TrainerCallback

from peft_psr.training import PSRTrainer
from peft_psr.training.runs.train import run as train_run
from peft_psr.training.runs.train.run import TrainRun


class Death(BaseException):
    """Ends a run as a kill does: nothing in the code catches it."""


class DieAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Death


def die_at(monkeypatch, step, trait=None):
    """Kill the run at a step of a trait's training (or any trait's)."""
    made = train_run.make_trainer

    def dying(*arguments):
        trainer = made(*arguments)
        if trait in (None, arguments[6]):
            trainer.add_callback(DieAt(step))
        return trainer

    monkeypatch.setattr(train_run, "make_trainer", dying)


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from peft_psr.training.runs.train import run as train_run
from peft_psr.training.runs.train.recipe import load_train_recipe

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

made = train_run.make_trainer
def dying(*arguments):
    trainer = made(*arguments)
    if arguments[6] == "kind":
        trainer.add_callback(Kill())
    return trainer
train_run.make_trainer = dying
train_run.TrainRun(Path(sys.argv[2]), load_train_recipe(sys.argv[1])).run()
"""


def test_kill_9_and_again_gives_the_adapter_of_an_uninterrupted_run(tmp_path, recipe):
    used = recipe(start="ridge", normalize_loss="global", regularizer=0.1, eval_share=0.2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(used.model_dump(mode="json")))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -9, killed.stderr[-2000:]
    done = tmp_path / "killed" / "brief" / "summary.json"
    before = done.stat().st_mtime_ns
    assert not (tmp_path / "killed" / "kind").exists()
    summaries = TrainRun(tmp_path / "killed", used).run()
    assert done.stat().st_mtime_ns == before and summaries["brief"]["resumed_from_step"] is None
    assert summaries["kind"]["resumed_from_step"] == 3
    TrainRun(tmp_path / "whole", used).run()
    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "step", "resumed"),
    [
        ({"traits": "kind", "start": "linear"}, 2, None),  # before the first checkpoint
        # inside an epoch
        ({"traits": "kind", "batch_size": 2, "gradient_accumulation_steps": 2, "checkpoint_steps": 3}, 8, 6),
        ({"parallel": True}, 7, 4),
        (STOPS_EARLY, -1, -3),  # before the last step, when it has waited once already
    ],
)
def test_stopped_anywhere(tmp_path, recipe, monkeypatch, settings, step, resumed):
    used = recipe(**settings)
    expected = TrainRun(tmp_path / "whole", used).run()
    if step < 0:
        step, resumed = (number + expected["kind"]["steps"] for number in (step, resumed))
    with monkeypatch.context() as patched:
        die_at(patched, step)
        with pytest.raises(Death):
            TrainRun(tmp_path / "parts", used).run()
    assert not (tmp_path / "parts" / "kind").exists()
    summaries = TrainRun(tmp_path / "parts", used).run()
    assert summaries["kind"]["resumed_from_step"] == resumed
    assert_same(tmp_path / "parts", tmp_path / "whole", used.traits)
    for trait, summary in summaries.items():
        assert summary["steps"] == expected[trait]["steps"]
        assert summary.get("eval_loss", 0) == pytest.approx(expected[trait].get("eval_loss", 0), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epochs": 1.5},  # transformers would go on from the last checkpoint for a step more
        STOPS_EARLY,
    ],
)
def test_killed_when_training_was_over(tmp_path, recipe, monkeypatch, settings):
    used = recipe(**{"traits": "kind", **settings})
    expected = TrainRun(tmp_path / "whole", used).run()["kind"]
    with monkeypatch.context() as patched:
        patched.setattr(PSRTrainer, "save_model", lambda trainer, folder, **_: die(trainer, folder))
        with pytest.raises(Death):
            TrainRun(tmp_path / "parts", used).run()
    found = TrainRun(tmp_path / "parts", used).run()["kind"]
    assert_same(tmp_path / "parts", tmp_path / "whole", ["kind"])
    assert found["steps"] == expected["steps"]


SAVE_MODEL = PSRTrainer.save_model


def die(trainer, folder):
    """Save checkpoints, but not the result."""
    if Path(folder).name == "saved":
        raise Death
    SAVE_MODEL(trainer, folder, True)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, recipe, monkeypatch):
    used = recipe(traits="kind")
    with monkeypatch.context() as patched:
        die_at(patched, 10)
        with pytest.raises(Death):
            TrainRun(tmp_path / "parts", used).run()
    state = tmp_path / "parts" / "checkpoints" / "kind" / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert TrainRun(tmp_path / "parts", used).run()["kind"]["resumed_from_step"] == 4
    TrainRun(tmp_path / "whole", used).run()
    assert_same(tmp_path / "parts", tmp_path / "whole", ["kind"])


def test_killed_while_adapters_are_put_in_place(tmp_path, recipe, monkeypatch):
    used = recipe(parallel=True)
    replace = train_run.os.replace

    def dying(source, target):
        if Path(target).name == "kind":
            raise Death
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(train_run.os, "replace", dying)
        with pytest.raises(Death):
            TrainRun(tmp_path, used).run()
    assert (tmp_path / "brief").exists() and not (tmp_path / "kind").exists()
    monkeypatch.setattr(TrainRun, "_train", lambda *_: pytest.fail("there is nothing left to train"))
    assert set(TrainRun(tmp_path, used).run()) == {"brief", "kind"}
    assert not (tmp_path / "checkpoints").exists()


def test_traits_can_be_added_and_checkpoints_kept(tmp_path, recipe):
    TrainRun(tmp_path, recipe(traits="kind", keep_checkpoints=True)).run()
    assert len(list((tmp_path / "checkpoints" / "kind").glob("checkpoint-*"))) == 3
    plans = TrainRun(tmp_path, recipe()).check()
    assert {plan.trait: plan.finished for plan in plans} == {"brief": False, "kind": True}
    assert set(TrainRun(tmp_path, recipe()).run()) == {"brief", "kind"}


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, recipe):
    # 12 triplets; a last batch that is not full would be filled up
    used = recipe(batch_size=2, checkpoint_steps=2, start="ridge", traits="kind", eval_share=0.2)
    one = TrainRun(tmp_path / "one", used.model_copy(update={"batch_size": 4})).run()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(used.model_dump(mode="json")))
    launch = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1,
              "num_processes": 2, "machine_rank": 0, "mixed_precision": "no", "use_cpu": True,
              "main_process_port": 0}  # fmt: skip
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(launch))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "accelerate.yaml",
               "-m", "peft_psr.cli", "train", tmp_path / "recipe.yaml", "--output", tmp_path / "two"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("live gates") == 1
    assert one["kind"]["triplets"] == 12
    assert_same(tmp_path / "one", tmp_path / "two", ["kind"], atol=1e-5)


def test_traits_of_a_parallel_run_stay_until_it_is_done(tmp_path, recipe, monkeypatch):
    with monkeypatch.context() as patched:
        die_at(patched, 2)
        with pytest.raises(Death):
            TrainRun(tmp_path, recipe(parallel=True)).run()
    with pytest.raises(ValueError, match="begun to train brief, kind together; left to train now are kind"):
        TrainRun(tmp_path, recipe(parallel=True, traits="kind")).run()
