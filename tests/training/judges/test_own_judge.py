"""A judge of one's own: a class in the registry, through every command; a plain function where functions are taken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.commands import psr
from helpers.runs import lines, pairs

from peft_psr.training.judges.base import Judge, JudgeScores, as_judge, judge_answers
from peft_psr.training.judges.registry import JUDGES
from peft_psr.training.judges.settings import JudgeSettings


SMALL = ["--source", "embedded", "--judge", "mine", "--traits", "pirate", "--questions", 3, "--instructions", 1,
         "--draws", 2, "--max-new-tokens", 40]  # fmt: skip


class LengthJudge(Judge):
    """The longer, the more of the trait."""

    def __init__(self, trait):
        self.trait = trait

    @classmethod
    def maker(cls, given):
        if not all(pair.prompt for pair in given.pairs):
            raise ValueError("nothing to judge")
        return cls

    def score(self, prompts, completions, pairs=None):
        self.usage["calls"] += len(completions)
        return [JudgeScores(min(100.0, 50.0 + len(text)), 100.0) for text in completions]

    def describe(self):
        return {"judge": "length", "trait": self.trait}


class TraitAlone(LengthJudge):
    scores_coherence = False


@pytest.fixture
def mine():
    JUDGES.add("mine", LengthJudge)
    yield LengthJudge
    JUDGES.remove("mine")


@pytest.fixture
def trait_alone():
    JUDGES.add("trait_alone", TraitAlone)
    yield
    JUDGES.remove("trait_alone")


# ---------------------------------------------------------------- in the registry


def test_it_scores_triplets(tmp_path, mine):
    run = ["triplets", *SMALL, "--model", "embedded", "--output", tmp_path / "run"]
    dry = psr(*run, "--dry-run")
    assert dry.exit_code == 0 and "judge: mine, without a model" in dry.output
    done = psr(*run)
    assert done.exit_code == 0, done.output
    rows = lines(tmp_path / "run" / "triplets.jsonl")
    assert rows and all(row["trait_score"] == min(100, 50 + len(row["completion"])) for row in rows)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["judges"] == {
        "pirate": {"judge": "length", "trait": "pirate"}
    }
    usage = [record["usage"] for record in lines(tmp_path / "run" / "scores.jsonl") if "usage" in record]
    assert usage == [{"calls": 6}]


def test_it_scores_a_benchmark(tmp_path, mine):
    done = psr("evaluate", "persona", *SMALL, "--models", "embedded", "--methods", "S-Const DiM", "--strengths", 1,
               "--calibration-steps", 1, "--score-draws", 1, "--output", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    cells = [json.loads(path.read_text()) for path in (tmp_path / "run" / "cells").glob("*.json")]
    assert len(cells) == 3
    assert "judge (mine)" in (tmp_path / "run" / "report.html").read_text()


def test_names_are_checked_and_listed(tmp_path, mine, trait_alone):
    options = [option if option != "mine" else "yours" for option in SMALL]
    failed = psr("triplets", *options, "--model", "embedded", "--output", tmp_path)
    accepted = "judge: 'yours' is wrong; accepted: grammar | ifeval | server | local | mine | trait_alone"
    assert failed.exit_code == 2 and accepted in failed.output


def recipe_with(**options):
    from peft_psr.training.runs.triplets.recipe import load_recipe

    return load_recipe(None, {"source": "embedded", "model": "embedded", **options})


def test_coherence_of_another_judge(tmp_path, mine, trait_alone):
    assert recipe_with(judge="trait_alone", coherence_judge="mine").model_judge is None
    local = recipe_with(judge="trait_alone", coherence_judge="local", judge_model="m")
    assert local.model_judge == "local" and not local.judge_at_server
    for options, message in [
        ({"judge": "trait_alone"}, "judge: trait_alone scores no coherence. Name a coherence_judge, or set"),
        (
            {"judge": "trait_alone", "coherence_judge": "trait_alone"},
            "coherence_judge: trait_alone scores no",
        ),
        ({"judge": "mine", "coherence_judge": "local", "judge_model": "m"}, "judge: mine scores coherence itself"),
        ({"judge": "trait_alone", "coherence_judge": "server"}, "a judge that is server needs judge_model"),
        ({"judge": "trait_alone", "coherence_judge": "server", "judge_model": "m"}, "needs judge_url"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe_with(**options)


def test_listing_judges_loads_nothing():
    script = """
import sys
from peft_psr.training.judges.registry import JUDGES
assert list(JUDGES) == ["grammar", "ifeval", "server", "local"] and "local" in JUDGES
loaded = [name for name in sys.modules if name.startswith("peft_psr.training.judges.")]
assert sorted(name.rpartition(".")[-1] for name in loaded) == ["base", "prompts", "registry", "settings"], loaded
assert JUDGES["local"].needs_model and not JUDGES["local"].at_server and JUDGES["server"].at_server
assert "peft_psr.training.judges.number_scores" not in sys.modules  # what computes
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# ---------------------------------------------------------------- by hand


def test_a_plain_function_is_a_judge():
    def judge(prompts, completions):
        return [JudgeScores(float(len(text)), 50.0) for text in completions]

    wrapped = as_judge(judge)
    prompt = pairs(1)[0].prompt
    assert wrapped.score([prompt], ["ab"]) == wrapped([prompt], ["ab"]) == [JudgeScores(2.0, 50.0)]
    assert wrapped.describe() == {"judge": "function"} and not wrapped.usage and as_judge(wrapped) is wrapped
    assert judge_answers(judge, [prompt] * 2, [None, "abc"]) == [JudgeScores(None, None), JudgeScores(3.0, 50.0)]
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        wrapped([prompt], ["a", "b"])


def test_pairs_stay_with_their_answers():
    seen = []

    class Knows(Judge):
        def score(self, prompts, completions, pairs=None):
            seen.extend(zip(prompts, completions, pairs, strict=True))
            return [JudgeScores(1.0, 1.0) for _ in completions]

    three = pairs(3)
    judge_answers(Knows(), [pair.prompt for pair in three], ["a", None, "c"], three)
    assert seen == [(three[0].prompt, "a", three[0]), (three[2].prompt, "c", three[2])]
    assert Knows().describe() == {"judge": "Knows"} and isinstance(Knows.maker(JudgeSettings())("any"), Knows)
