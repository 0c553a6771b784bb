"""The report of `psr evaluate axbench`: ratings of each method, concept by concept, by factor, and answers to read."""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from peft_psr.evaluation.benchmarks.cell import Cell, by, grouped
from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.intervals import value_of
from peft_psr.evaluation.reports.plots import legend_beside, styles, titled_axes
from peft_psr.evaluation.reports.report import Column, Report, SideBySide, Table, Value
from peft_psr.training.judges.ratings import PROMPTS

from .recipe import AxBenchRecipe


SAMPLED = 20
"""Concepts of which answers are shown."""

COLUMNS = (
    Column("score", "mean harmonic mean of an answer's three ratings, 0-2; 0 if one of them is 0", 3, "high"),
    Column("concept", "mean rating of how far the concept is brought in, 0-2", 3, "high"),
    Column("instruction", "mean rating of how far the instruction is followed, 0-2", 3, "high"),
    Column("fluency", "mean rating of how fluent the answer is, 0-2", 3, "high"),
    Column("factor", "mean strength chosen", 2),
    Column(
        "unparsable %",
        "of all rated answers, also those to choose the factor by: share without a score, because "
        "the judge gave no rating in the form asked for, 0-100",
    ),
)


def axbench_report(recipe: AxBenchRecipe, cells: Sequence[Cell]) -> Report:
    """Tables, figures and samples of what was measured of each model, concept, method and seed."""
    tables, details, figures, samples = [], [], {}, []
    concepts = {cell.more["concept"]: cell.result["description"] for cell in cells}
    for model, of_model in by(cells, "model").items():
        methods = by(of_model, "method")
        about = "one concept" if len(concepts) == 1 else f"mean over {len(concepts)} concepts"
        rows = {name: _row(of_method) for name, of_method in methods.items()}
        tables.append(Table(f"{model}: {about}", COLUMNS, rows))
        if len(concepts) > 1:
            details.append(_by_concept(model, methods, concepts))
        if any(cell.result["curve"] for cell in of_model):
            name = "factors_" + re.sub(r"[^\w+-]", "_", model)
            figures[name] = (
                score_by_factor(methods, f"Mean score by factor: {model}"),
                f"{model}: mean score over concepts at each factor, on the half of the instructions that the factor "
                "is chosen on. Grey: the prompted and the plain model on the other half.",
            )
        samples += _samples(of_model, recipe.seeds[0])
    return Report(
        title="AxBench: concepts brought into answers",
        description=(
            f"{len(concepts)} concept(s), each tried on {_halves(cells)}, none of them among its questions to train "
            f"on; seeds {', '.join(map(str, recipe.seeds))}. An answer of at most {recipe.max_new_tokens} tokens, "
            f"sampled at temperature {recipe.temperature:g}, is rated by {recipe.judge_model} for concept, "
            "instruction and fluency, 0, 1 or 2 each. Each adapter's factor is the one with the best mean score on "
            "the first half; the table is of the other half. Intervals are 95 % bootstrap intervals over "
            f"{'instructions' if len(concepts) == 1 else 'concepts'}, seeds pooled."
        ),
        tables=(*tables, *details),
        results={"judge_prompts": PROMPTS, "concepts": concepts, "cells": [_kept(cell) for cell in cells]},
        figures=figures,
        samples=tuple(samples),
        notes=(
            "An answer with a rating that could not be read has no score and is left out of the means; AxBench's own "
            "evaluation counts such a rating as 0.",
            "Of factors with equal means the smallest is taken; where no factor brings the concept in at all, that is "
            "the smallest of all.",
            "The judge's prompts are in this project's words, and the prompted model gets one instruction for all "
            "concepts, so numbers compare the rows of this table and not published tables.",
        ),
    )


def _halves(cells: Sequence[Cell]) -> str:
    instructions = cells[0].result["instructions"]
    choosing, scoring = len(instructions["choosing"]), len(instructions["scoring"])
    return f"{choosing} instructions to choose the factor by and {scoring} others to score"


def _row(cells: Sequence[Cell]) -> dict[str, Value]:
    """A method's row: means over its concepts' means, or over the instructions of a single concept."""
    scored = {key: [r for r in rows if r["score"] is not None] for key, rows in _grouped(cells).items()}
    without = sorted(str(key) for key, rows in scored.items() if not rows)
    why = f"without {len(without)} of {len(scored)} that have no score: {', '.join(without[:5])}" if without else None
    there = [rows for rows in scored.values() if rows]
    row = {}
    for name in ("score", *PROMPTS):
        row[name] = value_of([statistics.fmean(_read(answer, name) for answer in rows) for rows in there], why=why)
    factors = grouped(
        (cell.more["concept"], [cell.result["factor"]]) for cell in cells if cell.result["factor"] is not None
    )
    row["factor"] = value_of(
        factors, why=None if factors else "no adapter" if not cells[0].result["curve"] else "no score"
    )
    answers = [answer for cell in cells for answer in (*cell.result["choosing"], *cell.result["scoring"])]
    row["unparsable %"] = Value(100 * statistics.fmean(answer["score"] is None for answer in answers))
    return row


def _read(answer: Mapping[str, Any], name: str) -> float:
    return answer["score"] if name == "score" else answer["values"][name]


def _grouped(cells: Sequence[Cell]) -> dict[Any, list[Mapping[str, Any]]]:
    """Scored answers of all seeds by concept, or by instruction if there is but one concept."""
    single = len({cell.more["concept"] for cell in cells}) == 1
    return grouped(
        (
            instruction if single else cell.more["concept"],
            [answer for answer in cell.result["scoring"] if answer["instruction"] == instruction],
        )
        for cell in cells
        for instruction in cell.result["instructions"]["scoring"]
    )


def _by_concept(model: str, methods: Mapping[str, Sequence[Cell]], concepts: Mapping[int, str]) -> Table:
    rows = {}
    for concept, description in concepts.items():
        row = {}
        for name, cells in methods.items():
            answers = [a for cell in cells if cell.more["concept"] == concept for a in cell.result["scoring"]]
            scores = [answer["score"] for answer in answers if answer["score"] is not None]
            row[name] = Value(statistics.fmean(scores)) if scores else Value(None, why="no answer has a score")
        rows[f"{concept}: {description}"] = row
    columns = tuple(Column(name, "mean score, 0-2", 2) for name in methods)
    return Table(f"{model}: score by concept", columns, rows)


def score_by_factor(methods: Mapping[str, Sequence[Cell]], title: str) -> Figure:
    """Mean score of {method: its cells} against the factor, with the plain and the prompted model's as yardsticks."""
    steered = {name: cells for name, cells in methods.items() if any(cell.result["curve"] for cell in cells)}
    figure, axes = titled_axes(title, (8.2, max(4.8, 0.2 * len(methods) + 1)))
    style = styles(steered)
    for name, cells in steered.items():
        curve = mean_curve(cells)
        look: dict[str, Any] = {**style[name]}
        axes.plot(list(curve), list(curve.values()), label=name, markersize=4, **look)
    for name, line in {PROMPT: "--", PLAIN: ":"}.items():
        score = _row(methods[name])["score"].mean
        if score is not None:
            axes.axhline(score, color="#777777", linewidth=1, linestyle=line, zorder=0, label=name)
    axes.set(xlabel="factor (strength alpha)", ylabel="score (0-2)", ylim=(-0.02, None))
    legend_beside(axes)
    return figure


def mean_curve(cells: Sequence[Cell]) -> dict[float, float]:
    """{factor: mean over the concepts' mean scores}, seeds pooled; without factors at which there is no score."""
    points = (point for cell in cells for point in cell.result["curve"])
    found = grouped((factor, [mean]) for factor, mean, _ in points if mean is not None)
    return {factor: statistics.fmean(means) for factor, means in sorted(found.items())}


def _kept(cell: Cell) -> dict[str, Any]:
    """A cell without the answers to choose the factor by; how many of their ratings could not be read is counted."""
    lost = Counter(name for answer in (*cell.result["choosing"], *cell.result["scoring"]) for name in answer["unread"])
    known = {"model": cell.model, "concept": cell.more["concept"], "method": cell.method, "seed": cell.seed}
    rest = {name: value for name, value in cell.result.items() if name != "choosing"}
    return {**known, **rest, "unread_ratings": dict(lost)}


def _samples(cells: Sequence[Cell], seed: int) -> list[SideBySide]:
    """The answers to the first instruction to score, of the first concepts."""
    samples = []
    for concept in list(dict.fromkeys(cell.more["concept"] for cell in cells))[:SAMPLED]:
        shown = {c.method: c for c in cells if c.more["concept"] == concept and c.seed == seed and c.result["scoring"]}
        first = {method: cell.result["scoring"][0] for method, cell in shown.items()}
        answers = {method: answer["answer"] for method, answer in first.items()}
        scores = {method: _in_words(answer) for method, answer in first.items()}
        plain = shown[PLAIN]
        samples.append(
            SideBySide(plain.result["description"], plain.result["scoring"][0]["instruction"], answers, scores)
        )
    return samples


def _in_words(answer: Mapping[str, Any]) -> str:
    ratings = ", ".join(f"{name} {answer['values'].get(name, '?')}" for name in PROMPTS)
    factor = "" if answer["factor"] is None else f", factor {answer['factor']:g}"
    return f"{ratings}{factor}"
