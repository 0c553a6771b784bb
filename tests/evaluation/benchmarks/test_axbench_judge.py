"""AxBench's instructions, drawn for each concept, and its ratings: what the judge is asked and what of it counts."""

from __future__ import annotations

import json
import statistics

import pytest
from helpers.axbench import by_rule, recipe_in, what_was_asked
from helpers.unruly_server import UnrulyServer

from peft_psr.evaluation.benchmarks.axbench.judge import (
    PROMPTS,
    RatingJudge,
    Ratings,
    harmonic_mean,
    rating_judge,
    read_rating,
)
from peft_psr.evaluation.benchmarks.axbench.questions import make_trial, read_instructions
from peft_psr.training.data.draws import Completion, Failure
from peft_psr.training.judges.answer_cache import AnswerCache
from peft_psr.training.sources.axbench import Concept, Question


# ---------------------------------------------------------------- instructions


def test_instructions_are_read_in_every_layout(tmp_path):
    expected = [Question("Name a bird."), Question("Why?")]
    entries = [{"instruction": " Name a bird. ", "output": "Owl"}, {"instruction": "Why?"}, {"instruction": "Why?"}]
    files = {
        "a.json": json.dumps(entries),
        "b.json": json.dumps(["Name a bird.", "Why?"]),
        "c.jsonl": "\n".join(map(json.dumps, entries)) + "\n\n",
        "d.txt": "Name a bird.\n\n  Why?\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert read_instructions(tmp_path / name) == expected
    for name, content, message in [
        ("a.json", "{}", "must hold a list of instructions, got dict"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.json", '["x", {"input": "y"}]', "a.json, entry 1 must be a text or an object"),
        ("c.jsonl", '"x"\n{', "c.jsonl, line 2 is not JSON"),
        ("c.jsonl", '"x"\n{"instruction": " "}', "c.jsonl, line 2 must be"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_instructions(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="questions_data: no file"):
        read_instructions(tmp_path / "nowhere.txt")


def test_a_trial_is_of_the_concepts_genre_held_out_and_the_same_again():
    concept = Concept(3, "loops", ("code",), ("c0", "c1 "), ("", ""))
    asked = [Question(f"{genre[0]}{i}", genre) for genre in ("code", "text") for i in range(8)] + [Question("any")]
    trial = make_trial(concept, asked, 7, seed=0)
    drawn = [*trial.choosing, *trial.scoring]
    assert sorted(drawn) == sorted([*(f"c{i}" for i in range(2, 8)), "any"])
    assert (len(trial.choosing), len(trial.scoring)) == (3, 4)
    assert make_trial(concept, asked, 7, seed=0) == trial != make_trial(concept, asked, 7, seed=1)
    anything = [make_trial(Concept(number, "x", (), (), ()), asked, 17, seed=0) for number in (3, 4)]
    assert anything[0].scoring != anything[1].scoring  # each concept draws its own
    assert all(len({*some.choosing, *some.scoring}) == 17 for some in anything)
    with pytest.raises(ValueError, match="Concept 3 is to be tried on 8 instructions, and only 7 of 17 fit it"):
        make_trial(concept, asked, 8, seed=0)


# ---------------------------------------------------------------- ratings


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It does.\nRating: [[2]]", 2),
        ("Rating: [[0]]", 0),
        ("Because.\n\n  Rating: [[1]]  \n", 1),
        ("Rating: [[3]]", None),
        ("Rating: [[1.5]]", None),
        ("Rating: [[-1]]", None),
        ("Rating: 1", None),
        ("Rating: [[digit]]", None),
        ("rating: [[1]]", None),
        ("**Rating: [[1]]**", None),
        ("Rating: [[1]] out of 2", None),
        ("Rating: [[1]]\nIt does.", None),
        ("It says 'Rating: [[2]]'.\nRating: [[0]]", None),  # which of the two?
        ("<think>Rating: [[1]]</think>\nRating: [[2]]", 2),
        ("<think>Rating: [[1]]", None),
        ("2", None),
        ("", None),
    ],
)
def test_a_rating_counts_only_in_the_form_asked_for(reply, rating):
    assert read_rating(reply) == rating


def test_harmonic_mean_is_naught_if_one_is():
    for ratings in [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]:
        expected = 0 if 0 in ratings else statistics.harmonic_mean(ratings)
        assert harmonic_mean(ratings) == pytest.approx(expected)
        assert Ratings(dict(zip(PROMPTS, ratings, strict=True))).score == pytest.approx(expected)
    assert Ratings({"concept": 0, "fluency": 2}, {"instruction": "?"}).score is None
    for ratings in [(), (2, -1)]:
        with pytest.raises(ValueError, match="ratings of 0 or more"):
            harmonic_mean(ratings)


def test_the_judge_is_asked_three_questions_and_its_replies_are_kept(tmp_path):
    recipe = recipe_in(tmp_path, judge_url="http://localhost:1/v1")
    asked = [("of {answer} tea", "Say {concept}.", "tea, tea, <b> {concept}"), ("of tea", "Say tea.", "no")]
    with UnrulyServer(reply=lambda body: "" if "no" in what_was_asked(body)[1]["text"] else by_rule(body)) as server:
        recipe = recipe_in(tmp_path, judge_url=server.url)
        judge = rating_judge(recipe, tmp_path)
        first, second = judge([*asked, asked[0]])[:2]
        assert len(server.bodies) == 6 == judge.usage["calls"]
        parts = [what_was_asked(body) for body in server.bodies]
        assert ("concept", {"concept": asked[0][0], "text": asked[0][2]}) in parts
        assert ("instruction", {"instruction": asked[0][1], "text": asked[0][2]}) in parts
        assert ("fluency", {"text": asked[0][2]}) in parts
        assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0.0, 256)}
        assert first.values["concept"] == 2 and not second.values and second.score is None
        assert second.unread["fluency"] == "not in the form asked for: ''"
        again = rating_judge(recipe, tmp_path)
        assert again(asked) == [first, second] and len(server.bodies) == 6
        assert again.usage == {"cached": 6}
    other = rating_judge(recipe_in(tmp_path, judge_fields={"top_k": 1}), tmp_path)
    assert other.identity != judge.identity


def test_a_question_without_a_reply_stops_the_rating_and_is_asked_again(tmp_path):
    calls = []

    def sampler(draws):
        calls.append(len(draws))
        for place, draw in enumerate(draws):
            fails = len(calls) == 1 and place == 1
            yield draw, (Failure("timeout") if fails else Completion("Rating: [[1]]", False))

    judge = RatingJudge({}, lambda: sampler, AnswerCache(tmp_path / "a.sqlite"))
    with pytest.raises(ConnectionError, match=r"failed on 1 of 3 questions \(timeout\)"):
        judge([("c", "i", "a")])
    assert judge([("c", "i", "a")])[0].score == 1.0 and calls == [3, 1]


def test_reasoning_that_was_cut_off_holds_no_rating(tmp_path):
    def sampler(draws):
        for draw in draws:  # the judge's template has opened its reasoning
            yield draw, Completion("maybe so\nRating: [[1]]", True, opened=True)

    (rated,) = RatingJudge({}, lambda: sampler, AnswerCache(tmp_path / "a.sqlite"))([("c", "i", "a")])
    assert set(rated.unread) == set(PROMPTS) and rated.score is None


def test_a_local_model_judges_in_words(tmp_path):
    recipe = recipe_in(tmp_path, judge="local", judge_model="embedded")
    (rated,) = rating_judge(recipe, tmp_path)([("of tea", "What is tea like?", "Tea is warm.")])
    assert set(rated.unread) == set(PROMPTS) and rated.score is None  # it only knows small talk
    with pytest.raises(ValueError, match="judge: grammar gives no ratings"):
        rating_judge(recipe.model_copy(update={"judge": "grammar"}), tmp_path)
