"""Confidence intervals by the percentile bootstrap over questions.

Answers to one question resemble each other, so whole questions are drawn with replacement, all answers to a question
together (the cluster bootstrap; Davison and Hinkley, "Bootstrap Methods and their Application", 1997, sections 3.8
and 5.3).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .report import Value


Values = Sequence[Any] | Mapping[Any, Sequence[Any]]
"""Numbers, each a group of its own, or {group: its numbers}. In place of a number a row of them, all of one length."""


def bootstrap_interval(
    values: Values,
    statistic: Callable[[np.ndarray], float] = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The interval that holds the middle share `level` of a statistic, over draws of groups with replacement.

    Args:
        values: Numbers, or {question: the numbers of its answers}; questions without any are left out. Rows of numbers
            serve a statistic of more than one measure. Drawing depends on the number of groups and the seed alone, so
            two measures of the same questions are drawn alike.
        statistic: From the numbers of the drawn groups, (answers,) or (answers, row) float64, to a number.
        level: Between 0 and 1.
        draws: How many times to draw.
        seed: Of the draws.

    Returns:
        Lower and upper end, or `None` if there is but one group: one question tells nothing of others.

    Raises:
        ValueError: no values, a value that is not finite, or a level not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not a share: give one between 0 and 1, such as 0.95.")
    groups = _groups(values)
    if not groups:
        raise ValueError("There are no values to draw from: give at least one number.")
    if len(groups) == 1:
        return None
    drawn = np.random.default_rng(seed).integers(len(groups), size=(draws, len(groups)))
    if statistic is np.mean and groups[0].ndim == 1:
        sums, counts = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
        found = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    else:
        found = np.array([statistic(np.concatenate([groups[i] for i in row])) for row in drawn])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def value_of(values: Values, scale: float = 1.0, why: str | None = None, **settings: Any) -> Value:
    """The mean of some values with its interval, as a table's `Value`.

    `values` are as `bootstrap_interval` takes them and may be empty: then it is `Value(None, why=...)`. `scale` is 100
    for shares shown as percentages, `why` what is to be said of the number, `settings` those of `bootstrap_interval`.
    With but one question there is no interval, and it says why.
    """
    groups = _groups(values)
    if not groups:
        return Value(None, why=why or "no values")
    mean = float(np.mean(np.concatenate(groups))) * scale
    interval = bootstrap_interval(values, **settings)
    if interval is None:
        return Value(mean, why=why or "one question only, so no interval")
    return Value(mean, interval[0] * scale, interval[1] * scale, why)


def with_interval(mean: float, interval: tuple[float, float] | None) -> Value:
    """A statistic with its interval; without one, it says why."""
    return Value(mean, *interval) if interval else Value(mean, why="one prompt only, so no interval")


def _groups(values: Values) -> list[np.ndarray]:
    groups = values.values() if isinstance(values, Mapping) else ([value] for value in values)
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("A value is not a finite number: leave it out and say how many were.")
    return arrays
