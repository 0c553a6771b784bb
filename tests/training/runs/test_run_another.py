"""A run in a folder that holds one: the same goes on, another is refused."""

from __future__ import annotations

import json

import pytest
from filelock import FileLock
from helpers.models import tiny_model
from helpers.runs import FakeJudge, FakeSampler, contents, pairs, recipe, start
from helpers.tokenizers import tiny_tokenizer

from peft_psr.training.judges.number_scores import model_identity
from peft_psr.training.runs.triplets.run import MANIFEST, STATE, TRIPLETS, TripletRun


def test_another_recipe_is_refused(tmp_path):
    start(tmp_path)
    with pytest.raises(ValueError, match=r"begun with another recipe \(draws: 4 -> 5, seed: 0 -> 3\).*another folder"):
        start(tmp_path, draws=5, seed=3)


def test_speed_and_thresholds_may_change(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "a", FakeSampler(10))
    counts = start(tmp_path / "a", batch_size=2, max_failure_share=0.9, min_trait_score=70)
    start(tmp_path / "b", min_trait_score=70)
    assert contents(tmp_path / "a", [TRIPLETS]) == contents(tmp_path / "b", [TRIPLETS])
    sampler = FakeSampler()
    again = start(tmp_path / "a", sampler, min_trait_score=20)
    assert sampler.asked == [] and again.kept > counts.kept
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["recipe"]["min_trait_score"] == 20


def test_other_prompts_are_refused(tmp_path):
    start(tmp_path)
    with pytest.raises(ValueError, match="The prompts are not those"):
        start(tmp_path, plan=pairs(4))


def test_another_model_under_the_same_name_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, FakeSampler(3))
    with pytest.raises(ValueError, match="revision of the model fake is 'r2' now, and was 'r1'"):
        start(tmp_path, FakeSampler(revision="r2"))


def test_another_judge_is_refused(tmp_path):
    class Reworded(FakeJudge):
        def describe(self):
            return {"judge": "fake", "trait_prompt": "now in other words"}

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, judge=FakeJudge(stop=True))
    with pytest.raises(
        ValueError, match="trait_prompt of the judge of formal is 'now in other words' now, and was None"
    ):
        start(tmp_path, judge=Reworded())


def test_a_judge_with_another_chat_template_is_refused(tmp_path):
    class Local(FakeJudge):
        def __init__(self, template, **settings):
            super().__init__(**settings)
            self.processing_class = tiny_tokenizer()
            self.processing_class.chat_template += template

        def describe(self):
            return model_identity(tiny_model(), self.processing_class)

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, judge=Local("", stop=True))
    with pytest.raises(ValueError, match="template_hash of the judge of formal is"):
        start(tmp_path, judge=Local(" "))
    # a run begun before the hash had this name goes on
    state = json.loads((tmp_path / STATE).read_text())
    state["judges"]["formal"]["chat_template_hash"] = state["judges"]["formal"].pop("template_hash")
    (tmp_path / STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="template_hash of the judge of formal is"):
        start(tmp_path, judge=Local(" "))
    assert start(tmp_path, judge=Local("")).kept


def test_check_writes_nothing(tmp_path):
    run = TripletRun(tmp_path / "new", recipe(), pairs(), FakeSampler, lambda trait: FakeJudge())
    run.check()
    assert not (tmp_path / "new").exists()
    run.run()
    with pytest.raises(ValueError, match="begun with another recipe"):
        TripletRun(tmp_path / "new", recipe(seed=1), pairs(), FakeSampler, lambda trait: FakeJudge()).check()


def test_one_process_at_a_time(tmp_path):
    tmp_path.joinpath("run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(BlockingIOError, match="Another process is at work in"):
        start(tmp_path / "run")
    start(tmp_path / "run")


def test_a_folder_with_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        start(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        start(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
