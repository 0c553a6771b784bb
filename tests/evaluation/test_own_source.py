"""A source of the user's own, registered at run time, in recipes, `psr triplets` and `psr evaluate`."""

from __future__ import annotations

import pytest
from helpers.commands import psr

from peft_psr.evaluation import evaluate_persona
from peft_psr.tiny_chat import instructions, prompt_messages, questions
from peft_psr.training import PromptPair, add_instruction, read_triplets
from peft_psr.training.judges.prompts import COHERENCE_PROMPT
from peft_psr.training.runs.recipe_fields import in_words
from peft_psr.training.runs.triplets.assembly import check_template, judge_prompts, prompt_pairs
from peft_psr.training.runs.triplets.recipe import Recipe, load_recipe
from peft_psr.training.sources.base import Source
from peft_psr.training.sources.registry import SOURCES, check_test_split


RUBRIC = "How much of a pirate? {question} {answer}"
LOCAL = {"source": "harbour", "model": "embedded", "judge": "local", "judge_model": "j"}


class Harbour(Source):
    """Pirates' answers to the grammar's questions, the instruction always in the system turn."""

    has_test_split = True
    takes_instruction = False
    embedded_words = True
    judge = "grammar"

    def pairs(self, wanted):
        (name,) = wanted.chosen(["pirate"], "the harbour")
        bare = [prompt_messages(question.text) for question in questions(wanted.split)[: wanted.questions]]
        steered = [add_instruction(prompt, instructions(name, wanted.split)[0]) for prompt in bare]
        return [PromptPair(f"quay/{i}", name, x, y) for i, (x, y) in enumerate(zip(bare, steered, strict=True))]

    def judge_prompts(self, wanted):
        return {"pirate": RUBRIC}


@pytest.fixture(autouse=True)
def harbour():
    """The source, by the name that recipes know it by."""
    SOURCES.add("harbour", Harbour())
    yield SOURCES["harbour"]
    SOURCES.remove("harbour")


def test_recipes_know_it_and_what_it_has_no_choice_of():
    assert in_words(Recipe, "source") == "embedded | personas | ifeval | axbench | harbour"
    recipe = load_recipe(None, {**LOCAL, "split": "test", "questions": 2})
    pairs = prompt_pairs(recipe)
    assert [pair.id for pair in pairs] == ["quay/0", "quay/1"]
    assert pairs[0].prompt == prompt_messages(questions("test")[0].text)
    assert judge_prompts(recipe, pairs) == ({"pirate": RUBRIC}, COHERENCE_PROMPT)
    check_template(recipe, tokenizer=None)  # nothing is put anywhere
    wrong = {
        "placement: after": "source: harbour has no choice of placement",
        "instructions: 1": "source: harbour has no choice of instructions",
        "negatives: true": "source: harbour has no instructions for the opposite",
        "source: harbor": r"source: 'harbor' is wrong; accepted: embedded \|.*\| harbour\. Where",
    }
    for given, message in wrong.items():
        name, _, value = given.partition(": ")
        with pytest.raises(ValueError, match=message):
            load_recipe(None, {**LOCAL, name: value})
    with pytest.raises(ValueError, match="the harbour has no 'formal'; there are: pirate"):
        prompt_pairs(load_recipe(None, {**LOCAL, "traits": "formal"}))
    with pytest.raises(ValueError, match="judge: ifeval can score source: ifeval alone, got source: harbour"):
        load_recipe(None, {**LOCAL, "judge": "ifeval"})


def test_what_it_does_not_have_is_refused(harbour):
    harbour.needs_data = True
    with pytest.raises(ValueError, match="source: harbour needs data: File, folder or Hub data set"):
        load_recipe(None, LOCAL)
    harbour.needs_data = harbour.has_test_split = False
    with pytest.raises(ValueError, match="source: harbour has no choice of split"):
        load_recipe(None, {**LOCAL, "split": "test"})
    with pytest.raises(ValueError, match="source: harbour has no held-out questions.* use embedded or personas"):
        check_test_split("harbour")


def test_prompts_that_can_not_be_told_apart_or_are_none_are_refused(harbour, monkeypatch):
    pairs = prompt_pairs(load_recipe(None, LOCAL))
    for found, message in (([], "gave no prompts"), ([*pairs, pairs[3]], "gave 2 pairs the id 'quay/3'")):
        monkeypatch.setattr(harbour, "pairs", lambda wanted, found=found: found)
        with pytest.raises(ValueError, match=f"source: harbour {message}"):
            prompt_pairs(load_recipe(None, LOCAL))


def test_psr_triplets_and_evaluate_take_it(tmp_path):
    options = ("--source", "harbour", "--judge", "grammar", "--questions", 3, "--draws", 2, "--max-new-tokens", 60)
    done = psr("triplets", *options, "--model", "embedded", "--output", tmp_path / "run")
    assert done.exit_code == 0 and "of 6 completions as triplets" in done.output
    asked = [prompt_messages(question.text) for question in questions("train")[:3]]
    assert all(row["prompt"] in asked for row in read_triplets(tmp_path / "run" / "triplets.jsonl"))
    report = evaluate_persona(
        tmp_path / "table", source="harbour", models="embedded", judge="grammar", methods="S-Const DiM", questions=3,
        positions="response", draws=2, score_draws=1, strengths="1", calibration_steps=1, max_new_tokens=60,
        min_trait_score=0, min_coherence_score=0,
    )  # fmt: skip
    assert list(report.tables[0].rows) == ["none", "prompt", "S-Const DiM"]
    (folder,) = (tmp_path / "table" / "triplets" / "embedded").iterdir()
    assert folder.name == "pirate" and all(row["prompt"] in asked for row in read_triplets(folder / "triplets.jsonl"))
