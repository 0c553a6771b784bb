"""AxBench's ratings 0-2 by a language model: what it is asked, and what of its replies counts."""

from __future__ import annotations

import statistics

import pytest
from helpers.axbench import by_rule, what_was_asked
from helpers.unruly_server import MODEL, UnrulyServer

from peft_psr.training.data.draws import Completion, Failure
from peft_psr.training.judges.answer_cache import AnswerCache
from peft_psr.training.judges.ratings import PROMPTS, RatingJudge, Ratings, harmonic_mean, read_rating
from peft_psr.training.judges.settings import JudgeSettings


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


def given(folder, server, **more):
    return JudgeSettings(model=MODEL, url=server.url, cache=folder / "answers.sqlite", **more)


def test_the_judge_is_asked_three_questions_and_its_replies_are_kept(tmp_path):
    asked = [("of {answer} tea", "Say {concept}.", "tea, tea, <b> {concept}"), ("of tea", "Say tea.", "no")]
    with UnrulyServer(reply=lambda body: "" if "no" in what_was_asked(body)[1]["text"] else by_rule(body)) as server:
        judge = RatingJudge.of("server", given(tmp_path, server))
        first, second = judge([*asked, asked[0]])[:2]
        assert len(server.bodies) == 6 == judge.usage["calls"]
        parts = [what_was_asked(body) for body in server.bodies]
        assert ("concept", {"concept": asked[0][0], "text": asked[0][2]}) in parts
        assert ("instruction", {"instruction": asked[0][1], "text": asked[0][2]}) in parts
        assert ("fluency", {"text": asked[0][2]}) in parts
        assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0.0, 256)}
        assert first.values["concept"] == 2 and not second.values and second.score is None
        assert second.unread["fluency"] == "not in the form asked for: ''"
        again = RatingJudge.of("server", given(tmp_path, server))
        assert again(asked) == [first, second] and len(server.bodies) == 6
        assert again.usage == {"cached": 6}
    other = RatingJudge.of("server", given(tmp_path, server, fields={"top_k": 1}))
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
    judge = RatingJudge.of("local", JudgeSettings(model="embedded", cache=tmp_path / "answers.sqlite"))
    (rated,) = judge([("of tea", "What is tea like?", "Tea is warm.")])
    assert set(rated.unread) == set(PROMPTS) and rated.score is None  # it only knows small talk
    with pytest.raises(ValueError, match="judge: grammar gives no ratings"):
        RatingJudge.of("grammar", JudgeSettings())
