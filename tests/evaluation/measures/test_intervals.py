"""The bootstrap against a plain loop, and against intervals that are known to hold the truth."""

from __future__ import annotations

import random

import numpy as np
import pytest

from peft_psr.evaluation.reports.intervals import bootstrap_interval, value_of
from peft_psr.evaluation.reports.report import Value


BY_QUESTION = {"tea": [1.0, 2.0, 4.0], "dogs": [9.0], "rain": [], "music": [3.0, 3.5], "bread": [7.0, 0.0]}


def naive(groups, statistic, draws, level, seed):
    """Draw by draw, answer by answer, with another generator."""
    rng, found = random.Random(seed), []
    for _ in range(draws):
        answers = []
        for _ in groups:
            answers.extend(rng.choice(groups))
        found.append(statistic(answers))
    found.sort()
    return found[round((1 - level) / 2 * draws)], found[round((1 + level) / 2 * draws) - 1]


def mean(answers):
    return sum(answers) / len(answers)


def test_interval_is_the_naive_loops():
    groups = [answers for answers in BY_QUESTION.values() if answers]
    low, high = bootstrap_interval(BY_QUESTION, level=0.9, draws=20_000)
    expected = naive(groups, mean, 20_000, 0.9, seed=1)
    assert (low, high) == pytest.approx(expected, abs=0.1)
    assert bootstrap_interval(BY_QUESTION, lambda answers: answers.mean(), level=0.9, draws=20_000) == (low, high)


def test_statistic_of_rows():
    rows = {"a": [(1.0, 10.0), (2.0, 20.0)], "b": [(5.0, 0.0)], "c": [(4.0, 4.0)], "d": [(0.0, 3.0)]}

    def ratio(answers):
        return float(answers[:, 0].sum() / (1 + answers[:, 1].sum()))

    low, high = bootstrap_interval(rows, ratio, level=0.5)
    expected = naive(list(rows.values()), lambda rows: ratio(np.array(rows)), 4000, 0.5, seed=3)
    assert (low, high) == pytest.approx(expected, rel=0.1)


def test_seed_alone_decides():
    assert bootstrap_interval(BY_QUESTION, seed=4) == bootstrap_interval(BY_QUESTION, seed=4)
    numbers = [1.0, 5.0, 2.0, 0.3, 8.1, 9.4, 0.7, 3.3]
    assert bootstrap_interval(numbers, seed=4) != bootstrap_interval(numbers, seed=5)
    assert bootstrap_interval(numbers) == bootstrap_interval({number: [number] for number in numbers})


@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_interval_holds_the_truth_as_often_as_it_says(shared):
    """Also where answers to one question go up and down together, in which answer by answer would be too sure."""
    rng, held, answer_by_answer, runs = np.random.default_rng(0), 0, 0, 300
    for _ in range(runs):
        answers = rng.normal(size=(40, 5)) + shared * rng.normal(size=(40, 1))
        low, high = bootstrap_interval(dict(enumerate(answers)), level=0.9, draws=400)
        held += low <= 0 <= high
        low, high = bootstrap_interval(answers.flatten(), level=0.9, draws=400)
        answer_by_answer += low <= 0 <= high
    assert 0.84 < held / runs < 0.95
    assert (answer_by_answer / runs < 0.7) == (shared > 0)


def test_what_has_no_interval():
    assert bootstrap_interval([3.0]) is None and bootstrap_interval({"tea": [3.0, 4.0], "dogs": []}) is None
    assert value_of([3.0]) == Value(3.0, why="one question only, so no interval")
    assert value_of([]) == value_of({"tea": []}) == Value(None, why="no values")
    assert value_of([], why="the judge gave no score").why == "the judge gave no score"
    with pytest.raises(ValueError, match="no values to draw from"):
        bootstrap_interval({})
    with pytest.raises(ValueError, match="not a finite number"):
        bootstrap_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match="level=95 is not a share"):
        bootstrap_interval([1.0, 2.0], level=95)


def test_value_is_scaled_whole():
    low, high = bootstrap_interval([0.0, 1.0, 1.0])
    assert value_of([0.0, 1.0, 1.0], scale=100.0) == Value(pytest.approx(200 / 3), 100 * low, 100 * high)
