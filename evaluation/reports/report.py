"""What a benchmark has to say, whatever it measured: a table with intervals, figures, samples, and all single numbers.

`report_files` turns it into the files of a run's folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Value:
    """A number of a table, with its spread.

    Attributes:
        mean: The number, or `None` where it could not be had.
        low: Lower end of its interval, or `None` without one.
        high: Upper end.
        why: Why there is none, or why it is not exact; `None` if nothing is to be said.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its title, short.
        help: Unit, range and meaning, as a reader of the table needs them.
        digits: After the point.
        best: Which end is better, to mark the best row; "none" for no mark.
    """

    name: str
    help: str
    digits: int = 1
    best: str = "none"


@dataclass(frozen=True)
class SideBySide:
    """Answers to one prompt side by side.

    Attributes:
        trait: What is steered towards.
        prompt: The bare prompt as text.
        answers: {method: answer}; the plain and the prompted model's among them.
        scores: {method: what the judge said of the answer, in words}.
    """

    trait: str
    prompt: str
    answers: dict[str, str]
    scores: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: What it is about.
        columns: In order.
        rows: {method: {column's name: value}}, in order.
    """

    title: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Mapping[str, Value]]


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        title: Of the page.
        description: What was measured, on what, how: a paragraph of plain text.
        tables: The first is the summary.
        results: All single numbers as JSON, for `results.json`.
        figures: {file name without suffix: (figure, caption)}.
        samples: To read with one's own eyes.
        notes: What a reader must know to take the numbers right, a sentence or two each.
    """

    title: str
    description: str
    tables: tuple[Table, ...]
    results: Mapping[str, Any]
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)
    samples: tuple[SideBySide, ...] = ()
    notes: tuple[str, ...] = ()
