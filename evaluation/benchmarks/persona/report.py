"""The report of `psr evaluate persona`: a table over all traits, one a trait, curves, distances by layer, samples."""

import statistics
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from peft_psr.evaluation.benchmarks.cell import Cell, by, grouped
from peft_psr.evaluation.measures.scoring import SteeringScore
from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.intervals import value_of
from peft_psr.evaluation.reports.plots import (
    gates_by_token,
    rmse_by_layer,
    strength_by_token,
    trait_against_coherence,
)
from peft_psr.evaluation.reports.report import Column, Report, SideBySide, Table, Value
from peft_psr.prompts.conversations import last_text
from peft_psr.training.data.by_trait import folder_name

from .recipe import PersonaRecipe


COLUMNS = (
    Column("trait", "mean trait score at strength 1, 0-100", best="high"),
    Column("coherence", "mean coherence at strength 1, 0-100"),
    Column("TA@C80", "trait where mean coherence is 80, 0-100", best="high"),
    Column("TA@Cp", "trait where mean coherence is the prompted model's, 0-100", best="high"),
    Column("sd of seeds", "standard deviation of TA@C80 (mean over traits) over the seeds, in points", 2),
    Column("alpha@C80", "the strength there", 2),
    Column("alpha@Cp", "the strength there", 2),
    Column("recovery", "prompt recovery at strength 1: 1 = the prompt replaced, 0 = nothing done", 3, "high"),
    Column("seconds", "to make the adapter from its triplets", 1),
    Column("bytes", "of the adapter's file", 0),
)
_NUMBERS = {"recovery": "prompt_recovery", "seconds": "train_seconds", "bytes": "adapter_bytes"}
FAR_OFF = 5.0
"""Points of coherence beyond which a strength does not count as found."""
_SCORES = {"trait": ("alpha1", 0), "coherence": ("alpha1", 1), "TA@C80": ("c80", 0), "TA@Cp": ("cp", 0)}


def persona_report(recipe: PersonaRecipe, cells: Sequence[Cell], left_out: Sequence[str] = ()) -> Report:
    """Tables, figures and samples of each model, trait, method and seed; and what could not be measured, and why."""
    tables: list[Table] = []
    figures: dict[str, tuple[Figure, str]] = {}
    samples: list[SideBySide] = []
    traits = list(dict.fromkeys(cell.trait for cell in cells))
    for model, of_model in by(cells, "model").items():
        if len(traits) > 1:
            tables.append(_table(f"{model}: mean over {len(traits)} traits", of_model))
        for trait, of_trait in by(of_model, "trait").items():
            tables.append(_table(f"{model}: {trait}", of_trait))
            first = {cell.method: cell for cell in of_trait if cell.seed == recipe.seeds[0]}
            figures |= _figures(folder_name(f"{model}_{trait}"), trait, first)
            samples += _samples(trait, first)
    intervals = (
        "Intervals of scores are 95 % bootstrap intervals over questions, seeds pooled; those of other columns are "
        "the least and the largest over traits and seeds."
    )
    return Report(
        title="Personas: trait against coherence",
        description=(
            f"Answers to held-out questions, scored by the judge ({recipe.judge}) for the trait and for coherence. "
            f"{len(traits)} trait(s), seeds {', '.join(map(str, recipe.seeds))}; adapters edit the positions "
            f"{recipe.positions!r}; single-layer methods edit "
            f"{'the layer before the middle' if recipe.layer is None else f'layer {recipe.layer}'}. {intervals}"
        ),
        tables=tuple(tables),
        results={
            "benchmark": "persona",
            "recipe": recipe.model_dump(mode="json"),
            "cells": [cell.as_json() for cell in cells],
        },
        figures=figures,
        samples=tuple(samples),
        notes=(
            *left_out,
            *_unscored(cells),
            "Strengths for TA@C80 and TA@Cp are chosen on the answers that are scored there, for every method alike.",
            "Strength 1 is where training was; for what is computed and not trained (DiM, ActAdd, ITI, Stolfo et al.) "
            "it is the unit that the source gives it, so compare those at TA@C80 and TA@Cp.",
            "HyperSteer, of the paper's AxBench table, is not done.",
            f"A run whose coherence does not come within {FAR_OFF:g} points of the target has no value there; means "
            "are over the runs that have.",
        ),
    )


def _table(title: str, cells: Sequence[Cell]) -> Table:
    rows = {}
    for method, of_method in by(cells, "method").items():
        adapter = method not in (PLAIN, PROMPT)
        row = {column.name: Value(None, why="no adapter, so no strength") for column in COLUMNS}
        row |= {name: _score(of_method, *where) for name, where in _SCORES.items() if adapter or where[0] == "alpha1"}
        if adapter:
            row["sd of seeds"] = _sd_of_seeds(of_method)
            row["alpha@C80"] = _mean([_alpha(cell, "c80") for cell in of_method])
            row["alpha@Cp"] = _mean([_alpha(cell, "cp") for cell in of_method])
            row |= {name: _mean([cell.result[key] for cell in of_method]) for name, key in _NUMBERS.items()}
        rows[method] = row
    return Table(title, COLUMNS, rows)


def _score(cells: Sequence[Cell], place: str, which: int) -> Value:
    """Mean of the trait (0) or coherence (1) scores at a place of the curve, with its interval."""
    there = [cell for cell in cells if place == "alpha1" or _reached(cell, place)]
    groups = grouped(
        ((cell.trait, question), [answer[which] for answer in answers])
        for cell in there
        for question, answers in enumerate(cell.result["by_question"][place])
    )
    whys = []
    if there and len(there) < len(cells):
        whys.append(f"mean over {len(there)} of {len(cells)} runs")
    if place != "alpha1":
        found = [(cell, cell.result[place]["why"]) for cell in cells]
        whys += [f"{cell.trait}, seed {cell.seed}: {why}" for cell, why in found if why]
    return value_of({key: scores for key, scores in groups.items() if scores}, why="; ".join(whys) or None)


def _reached(cell: Cell, place: str) -> bool:
    """Whether a strength was found there, with a coherence near the target."""
    found = cell.result[place]
    return found["alpha"] is not None and abs(found["coherence"] - found["target"]) <= FAR_OFF


def _alpha(cell: Cell, place: str) -> float | None:
    return cell.result[place]["alpha"] if _reached(cell, place) else None


def _unscored(cells: Sequence[Cell]) -> list[str]:
    lost, asked = (sum(cell.result["unscored"][i] for cell in cells) for i in (0, 1))
    return (
        [f"{lost} of {asked} answers got no usable score from the judge; means are over the others."] if lost else []
    )


def _mean(found: Sequence[float | None]) -> Value:
    numbers = [value for value in found if value is not None]
    if not numbers:
        return Value(None, why="not there in any run")
    why = None if len(numbers) == len(found) else f"mean over {len(numbers)} of {len(found)}"
    if len(numbers) == 1:
        return Value(numbers[0], why=why)
    return Value(statistics.fmean(numbers), min(numbers), max(numbers), why)


def _sd_of_seeds(cells: Sequence[Cell]) -> Value:
    by_seed = grouped((cell.seed, [cell.result["c80"]["trait"]]) for cell in cells if _reached(cell, "c80"))
    if len(by_seed) < 2:
        return Value(None, why="not two seeds")
    return Value(statistics.stdev(statistics.fmean(values) for values in by_seed.values()))


def _figures(stem: str, trait: str, cells: Mapping[str, Cell]) -> dict[str, tuple[Figure, str]]:
    methods = {name: cell for name, cell in cells.items() if name not in (PLAIN, PROMPT)}
    if not methods:
        return {}
    plain, prompted = (SteeringScore(**cells[name].result["alpha1"]) for name in (PLAIN, PROMPT))
    curves = {name: [SteeringScore(**point) for point in cell.result["curve"]] for name, cell in methods.items()}
    rmse = {name: cell.result["relative_rmse"] for name, cell in methods.items()}
    return _looks_inside(stem, trait, methods) | {
        f"curve_{stem}": (
            trait_against_coherence(curves, plain, prompted, trait),
            f"{trait}: trait against coherence from weak to strong, one line a method. The upper right is best.",
        ),
        f"rmse_{stem}": (
            rmse_by_layer(rmse, trait),
            f"{trait}: distance to the prompted residual stream at strength 1, by layer; 0 is the prompt, 1 nothing.",
        ),
    }


def _looks_inside(stem: str, trait: str, methods: Mapping[str, Cell]) -> dict[str, tuple[Figure, str]]:
    """One completion token by token, through the gated method with the highest prompt recovery."""
    gated = {name: cell for name, cell in methods.items() if cell.result["example"]["gates"]}
    if not gated:
        return {}
    name = max(gated, key=lambda method: gated[method].result["prompt_recovery"])
    example = gated[name].result["example"]
    prompt, adapter = (torch.tensor(example[which]) for which in ("prompt", "adapter"))
    gates = {layer: torch.tensor(values) for layer, values in example["gates"].items()}
    return {
        f"strength_{stem}": (
            strength_by_token(example["tokens"], prompt, adapter, name),
            f"{trait}: how far the prompt and {name} move each token of one held-out completion, on a log scale.",
        ),
        f"gates_{stem}": (
            gates_by_token(example["tokens"], gates, name),
            f"{trait}: how far the gates of {name} open on the same completion, by layer and token.",
        ),
    }


def _samples(trait: str, cells: Mapping[str, Cell]) -> list[SideBySide]:
    samples = []
    for i, sample in enumerate(cells[PLAIN].result["samples"]):
        answers, scores = {}, {}
        for method, cell in cells.items():
            given = cell.result["samples"][i]
            answers[method] = given["answer"]
            strength = "" if given["alpha"] is None else f", alpha {given['alpha']:.2g}"
            trait_score, coherence = (_points(given[name]) for name in ("trait_score", "coherence_score"))
            scores[method] = f"trait {trait_score}, coherence {coherence}{strength}"
        samples.append(SideBySide(trait, last_text(sample["prompt"]), answers, scores))
    return samples


def _points(score: float | None) -> str:
    return "?" if score is None else f"{score:.0f}"
