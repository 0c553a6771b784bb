"""Tables and figures of the faithfulness benchmark, from what it has measured; see `movement` for the formulas."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peft_psr.evaluation.benchmarks.cell import Cell, by, grouped
from peft_psr.evaluation.measures.movement import LATER, NEUTRAL, POSITION_GROUPS, REWORDED, STEERED
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.evaluation.reports.intervals import bootstrap_interval, value_of, with_interval
from peft_psr.evaluation.reports.plots import (
    gates_by_token,
    legend_beside,
    rmse_by_layer,
    strength_by_token,
    styles,
    titled_axes,
)
from peft_psr.evaluation.reports.report import Column, Report, Table, Value
from peft_psr.training.data.by_trait import folder_name

from .recipe import FaithfulnessRecipe


ROW_NAMES = {REWORDED: "reworded prompt", NEUTRAL: "neutral instruction"}
PLACES = 48
"""Tokens of a response that the figures by place show."""
DRAWN = 6
"""Methods whose lines can be told apart in one figure."""
REFERENCES = {
    "prompt": {"color": "black", "linestyle": "-", "marker": "", "linewidth": 2.2},
    "neutral instruction": {"color": "#cc3311", "linestyle": "-.", "marker": "", "linewidth": 2.2},
}
"""How lines are drawn that are no method's."""


RECOVERY, RMSE, LAST = "prompt recovery", "RMSE, mean of layers", "RMSE, last layer"
COLUMNS = (
    Column(RECOVERY, "1 - KL(prompted || steered) / KL(prompted || base); 1 = the prompt replaced, 0 = nothing done",
           3, "high"),
    Column(RMSE, "distance to the prompted residual stream over the prompt's own effect; 0 = the prompt, 1 = nothing "
           "done; mean of all decoder layers", 3, "low"),
    Column(LAST, "the same at the last decoder layer", 3, "low"),
    Column("moves as the prompt", "Spearman correlation over a response's tokens of how far the method and the prompt "
           "move each; -1 to 1", 2),
    Column("as the neutral", "the same with a neutral instruction in the prompt's place", 2),
    Column("as the prompt, given the neutral", "partial correlation: what agrees with the prompt beyond what any "
           "instruction moves", 2),
)  # fmt: skip
_MEASURES = ("edit_prompt", "edit_neutral", "edit_prompt_given_neutral")
CORRELATIONS = {column.name: measure for column, measure in zip(COLUMNS[3:], _MEASURES, strict=True)}
CONTROL_COLUMNS = (
    Column("prompt", "|change of the stream| / |stream| under the trait's instruction, mean of layers and tokens", 3),
    Column("neutral", "the same under the neutral instruction", 3),
    Column(
        "neutral size",
        "RMS of what the neutral instruction moves over RMS of what the prompt moves, mean of layers; 1 = as much",
        2,
    ),
    Column("cosine", "of the two changes, over all tokens of the group, mean of layers; 1 = the same change", 2),
)


def faithfulness_report(recipe: FaithfulnessRecipe, cells: Sequence[Cell]) -> Report:
    """Tables and figures of all models, traits, methods, seeds and strengths, in the order of the tables."""
    alphas = recipe.alphas
    tables: list[Table] = []
    figures: dict[str, tuple[Figure, str]] = {}
    models = by(cells, "model")
    for model, own in models.items():
        of_model, suffix = (f" of {model}", f"_{folder_name(model)}") if len(models) > 1 else ("", "")
        rows = list(_rows(own, alphas))
        values = {name: _values(of_row, which) for name, of_row, which in rows}
        tables += [
            Table(f"Faithfulness to the prompt{of_model}", COLUMNS, values),
            Table(f"What a neutral instruction moves{of_model}", CONTROL_COLUMNS, control_rows(_one_a_trait(own))),
        ]
        # figures are of the first strength alone: more lines could not be told apart
        drawn = list(_rows([cell for cell in own if cell.more["alpha"] == alphas[0]], alphas[:1]))
        traits = by(own, "trait")
        about = (", ".join(traits) if len(traits) < 4 else f"{len(traits)} traits") + of_model
        figures[f"rmse_by_layer{suffix}"] = (
            rmse_by_layer({name: layer_rmse(of_row, which) for name, of_row, which in drawn if of_row}, about),
            f"Relative RMSE by decoder layer at strength {alphas[0]:g}, pooled over traits, prompts and "
            "seeds. The reworded prompt is the yardstick, the neutral instruction the control.",
        )
        figures[f"strength_by_place{suffix}"] = (
            strength_by_place(_places(drawn), about),
            f"How far each token of a response moves, by its place; mean over layers and completions; of the methods "
            f"the {DRAWN} with the highest prompt recovery. 0 is the last prompt token.",
        )
        for trait, of_trait in traits.items():
            best = _best(of_trait)
            figures[f"strength_by_token{suffix}_{folder_name(trait)}"] = (
                _heat_maps(best),
                f"One completion with the trait {trait}: what the prompt, the adapter and a neutral instruction move.",
            )
            if gated := [cell for cell in of_trait if cell.result["example"].get("gates")]:
                best = _best(gated)
                figures[f"gates{suffix}_{folder_name(trait)}"] = (
                    gates_by_token(
                        best.result["example"]["tokens"],
                        {layer: torch.tensor(values) for layer, values in best.result["example"]["gates"].items()},
                        best.method,
                    ),
                    f"The same completion: how far the adapter's gates open, by layer and token ({trait}).",
                )
    return Report(
        title="Faithfulness to the prompt",
        description=_description(recipe, cells),
        tables=tuple(tables),
        results={
            "benchmark": "faithfulness",
            "recipe": recipe.model_dump(mode="json"),
            "neutral_instruction": recipe.control,
            "cells": [_single_numbers(cell) for cell in cells],
        },
        figures=figures,
        notes=(*_notes(cells), *_every_token_note(recipe)),
    )


def _best(cells: Sequence[Cell]) -> Cell:
    return max(cells, key=lambda cell: _recovery([cell], STEERED)[0])


def _rows(cells: Sequence[Cell], alphas: Sequence[float]) -> Iterator[tuple[str, list[Cell], str]]:
    """Name of each row, the cells behind it, and which of the runs in them it is about."""
    references = _one_a_trait(cells)
    for which, name in ROW_NAMES.items():
        yield name, [cell for cell in references if which in cell.result["prompts"][0]["kl"]], which
    for method, of_method in by(cells, "method").items():
        for alpha in alphas:
            name = method if len(alphas) == 1 else f"{method}, alpha {alpha:g}"
            yield name, [cell for cell in of_method if cell.more["alpha"] == alpha], STEERED


def _one_a_trait(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each trait: what does not depend on the adapter is the same in all of them."""
    return list({cell.trait: cell for cell in reversed(cells)}.values())[::-1]


Groups = dict[tuple[str, int], list[Any]]
"""{(trait, prompt): one entry for each cell or completion}."""


def _by_prompt(cells: Sequence[Cell]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    for cell in cells:
        for number, known in enumerate(cell.result["prompts"]):
            yield (cell.trait, number), known


def _recovery(cells: Sequence[Cell], which: str) -> tuple[float, Groups]:
    groups = grouped((key, [[known["kl"][which], known["kl"]["base"]]]) for key, known in _by_prompt(cells))
    return _one_minus_ratio(np.concatenate([np.array(rows) for rows in groups.values()])), groups


def _one_minus_ratio(rows: np.ndarray) -> float:
    return float(1 - rows[:, 0].sum() / rows[:, 1].sum())


def _rmse_groups(cells: Sequence[Cell], which: str) -> Groups:
    return grouped((key, [[known["errors"][which], known["errors"]["prompt"]]]) for key, known in _by_prompt(cells))


def _rmse(rows: np.ndarray) -> np.ndarray:
    """(layers,) from (n, 2, layers): squared errors and the prompt's own effect."""
    error, effect = rows.sum(axis=0)
    return np.sqrt(error / np.maximum(effect, 1e-30))


def layer_rmse(cells: Sequence[Cell], which: str) -> dict[int | str, float]:
    """{layer: relative RMSE} pooled over the cells; empty without any."""
    if not cells:
        return {}
    pooled = _rmse(np.concatenate([np.array(rows) for rows in _rmse_groups(cells, which).values()]))
    return dict(zip(cells[0].result["layers"], pooled.tolist(), strict=True))


def _values(cells: Sequence[Cell], which: str) -> dict[str, Value]:
    if not cells:
        return {column.name: Value(None, why="every prompt has but one instruction") for column in COLUMNS}
    recovery, groups = _recovery(cells, which)
    errors = _rmse_groups(cells, which)
    by_layer = list(layer_rmse(cells, which).values())
    values = {
        RECOVERY: with_interval(recovery, bootstrap_interval(groups, _one_minus_ratio)),
        RMSE: with_interval(float(np.mean(by_layer)), bootstrap_interval(errors, lambda r: float(_rmse(r).mean()))),
        LAST: with_interval(by_layer[-1], bootstrap_interval(errors, lambda r: float(_rmse(r)[-1]))),
    }
    for column, name in CORRELATIONS.items():
        measured = _by_prompt(cells if which == STEERED else [])
        found = grouped((key, known["correlations"][name]) for key, known in measured)
        why = "it moves every token alike" if which == STEERED else "measured of adapters"
        values[column] = value_of(found, why=None if any(found.values()) else why)
    return values


def control_rows(cells: Sequence[Cell]) -> dict[str, dict[str, Value]]:
    """{group of tokens: what the prompt and the neutral instruction move there}."""
    rows = {}
    later = max(end for _, end in POSITION_GROUPS.values())
    for group, (first, end) in {**POSITION_GROUPS, LATER: (later, PLACES)}.items():
        groups = grouped((key, [known["neutral"][group]]) for key, known in _by_prompt(cells))
        pooled = np.concatenate([np.array(sums) for sums in groups.values()])
        if not pooled.any():
            rows[group] = {column.name: Value(None, why="no such tokens") for column in CONTROL_COLUMNS}
            continue
        strengths = {
            name: [value for cell in cells for value in cell.result["places"][name][first:end]]
            for name in ("prompt", NEUTRAL)
        }
        rows[group] = {name: Value(float(np.mean(values))) for name, values in strengths.items()}
        for name, statistic in (("neutral size", _size), ("cosine", _cosine)):
            rows[group][name] = with_interval(statistic(pooled), bootstrap_interval(groups, statistic))
    return rows


def _size(rows: np.ndarray) -> float:
    """From (n, 3, layers) of `neutral_sums`; layers that the prompt does not move are left out."""
    neutral, prompt, _ = rows.sum(axis=0)
    return float(np.sqrt(neutral[prompt > 0] / prompt[prompt > 0]).mean())


def _cosine(rows: np.ndarray) -> float:
    neutral, prompt, dot = rows.sum(axis=0)
    moved = (prompt > 0) & (neutral > 0)
    return float((dot[moved] / np.sqrt(neutral[moved] * prompt[moved])).mean())


def _places(rows: Sequence[tuple[str, list[Cell], str]]) -> dict[str, list[float]]:
    """{name: mean strength by place} of the prompt and each row; the reworded prompt would hide the prompt's line."""
    control = next(row for row in rows if row[2] == NEUTRAL)
    methods = [row for row in rows if row[2] == STEERED]
    best = sorted(methods, key=lambda row: -_recovery(row[1], STEERED)[0])[:DRAWN]
    shown = [("prompt", control[1], "prompt"), control, *(row for row in methods if row in best)]
    found = {}
    for name, cells, which in shown:
        longest = min(len(cell.result["places"][which]) for cell in cells)
        found[name] = np.mean([cell.result["places"][which][:longest] for cell in cells], axis=0).tolist()
    return found


def strength_by_place(strengths: Mapping[str, Sequence[float]], trait: str) -> Figure:
    """How far tokens move by their place in the response, on a log scale; one line a method or prompt.

    `strengths`: {name: |change of the stream| / |stream| by place, from the last prompt token on}.
    """
    size = (8.2, max(4.8, 0.2 * len(strengths) + 1))
    figure, axes = titled_axes(f"Change of the residual stream by place: {trait}", size)
    others = styles([name for name in strengths if name not in REFERENCES])
    for name, values in strengths.items():
        # a method may leave a token alone, which a log scale can't show
        points = [value if value > 0 else float("nan") for value in values]
        axes.plot(range(len(points)), points, label=name, markersize=3, **(REFERENCES.get(name) or others[name]))
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="token of the response (0: the last prompt token)", ylabel="|change| / |stream|, mean of layers")
    legend_beside(axes)
    return figure


def _heat_maps(cell: Cell) -> Figure:
    example = cell.result["example"]
    prompt, steered, neutral = (torch.tensor(example[name]) for name in ("prompt", STEERED, NEUTRAL))
    return strength_by_token(example["tokens"], prompt, steered, cell.method, control=neutral)


def _single_numbers(cell: Cell) -> dict[str, Any]:
    found = [*cell.result["prompts"][0]["kl"]]
    return {
        **replace(cell, result={}).as_json("alpha"),
        "prompt_recovery": {name: _recovery([cell], name)[0] for name in found if name != "base"},
        "relative_rmse": {name: layer_rmse([cell], name) for name in found if name != "base"},
        "token_correlations": {
            name: float(np.mean(values)) if values else None
            for name in cell.result["prompts"][0]["correlations"]
            for values in [[v for known in cell.result["prompts"] for v in known["correlations"][name]]]
        },
    }


def _description(recipe: FaithfulnessRecipe, cells: Sequence[Cell]) -> str:
    traits = ", ".join(dict.fromkeys(cell.trait for cell in cells))
    return (
        f"On completions of the prompted model to the held-out prompts of {traits}, "
        "the same tokens were run plain, prompted, steered, under another of the trait's instructions, and under the "
        f"neutral instruction {recipe.control!r}. Strengths: {', '.join(f'{alpha:g}' for alpha in recipe.alphas)}. "
        "Intervals are 95 % bootstraps over prompts, pooled over traits and seeds."
    )


def _every_token_note(recipe: FaithfulnessRecipe) -> tuple[str, ...]:
    names = [name for name in recipe.methods if METHODS[name].every_token]
    if recipe.positions == "response" or not names:
        return ()
    return (
        f"{', '.join(names)}: every token's computation is changed; measured on the response, the others on "
        f"{recipe.positions}.",
    )


def _notes(cells: Sequence[Cell]) -> tuple[str, ...]:
    between = [
        value
        for cell in _one_a_trait(cells)
        for known in cell.result["prompts"]
        for value in known["correlations"]["prompt_neutral"]
    ]
    mean = f" (here {np.mean(between):.2f} on average)" if between else ""
    return (
        "The first tokens of a response move under any instruction. That an adapter is strong where the prompt is "
        "strong shows that it has found the trait's tokens only as far as it does so beyond the neutral instruction: "
        f"the last column. What the prompt and the neutral instruction move agrees by itself{mean}.",
        "Movements are accumulated: a constant edit too moves tokens by different amounts in the layers after it. Its "
        "correlations are the mark that a gate has to beat.",
        "A method that edits one layer has a relative RMSE of 1 in every layer before it.",
        "The reworded prompt shows how far apart two wordings of one trait are: an RMSE below that is as near to the "
        "prompt as another prompt would be.",
    )
