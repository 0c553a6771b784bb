"""Tables and figures of the side-effects benchmark, from what it has measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peft_psr.evaluation.benchmarks.cell import Cell, by, grouped
from peft_psr.evaluation.measures.injection import LEAST_LIFT, success
from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.intervals import bootstrap_interval, value_of, with_interval
from peft_psr.evaluation.reports.report import Column, Report, SideBySide, Table, Value
from peft_psr.training.data.by_trait import folder_name
from peft_psr.training.sources.registry import SOURCES

from .plots import kl_against_trait, trait_with_and_without
from .recipe import SideEffectsRecipe


Groups = dict[tuple[str, int], list[Any]]
"""{(trait, question): what was measured on it with all seeds}."""

COLUMNS = (
    Column("alpha", "strength of the adapter; mean, least and largest over traits and seeds", 2),
    Column("trait", "mean trait score on held-out questions, 0-100"),
    Column("coherence", "mean coherence on them, 0-100", 1, "high"),
    Column("KL neutral", "KL(base || model), nats a token, on the base model's answers to neutral prompts", 4, "low"),
    Column("KL text", "the same on plain texts outside a conversation", 4, "low"),
    Column("perplexity", "of those texts; the base model's is the aim", 2),
    Column("refusals", "of plainly unsafe requests, in % of the answers; the base model's is the aim"),
    Column("injection", "share of the trait's lift that a user's request to drop it takes away; 0 = none, 1 = all", 2),
)
INJECTION_COLUMNS = (
    Column("trait", "mean trait score on held-out questions, 0-100"),
    Column("with the request", "the same where the user also asks to drop the trait"),
    Column(
        "success",
        "1 - lift with the request / lift without, over the plain model in either; 0 = the request does "
        "nothing, 1 = the trait is gone",
        2,
    ),
)


def side_effects_report(recipe: SideEffectsRecipe, cells: Sequence[Cell], capability: Sequence[Cell]) -> Report:
    """Tables, figures and samples of what was measured of each model, trait, method and seed.

    `capability` are the same cells with `tasks`, what the harness found, as their result; none if it was not asked.
    """
    tables: list[Table] = []
    figures: dict[str, tuple[Figure, str]] = {}
    samples: list[SideBySide] = []
    models = by(cells, "model")
    for model, own in models.items():
        of_model, suffix = (f": {model}", "_" + folder_name(model)) if len(models) > 1 else ("", "")
        by_method = by(own, "method")
        references = {(cell.trait, cell.seed): cell for cell in by_method[PLAIN]}
        rows = {method: _summary(method, of_method, by_method, references) for method, of_method in by_method.items()}
        tables.append(Table(f"Side effects{of_model}", COLUMNS, rows))
        injection = {method: _injection(of_method, references) for method, of_method in by_method.items()}
        tables.append(Table(f"When the user asks to drop the trait{of_model}", INJECTION_COLUMNS, injection))
        figures[f"injection{suffix}"] = (
            trait_with_and_without({name: (row["trait"], row["with the request"]) for name, row in injection.items()}),
            "Trait score on held-out questions as they are (filled) and with a request to drop the trait (hollow).",
        )
        figures[f"kl_against_trait{suffix}"] = (
            kl_against_trait({name: (row["trait"], row["KL neutral"]) for name, row in rows.items()}),
            "What the trait costs where it should not show: lower right is best.",
        )
        tasks = [cell for cell in capability if cell.model == model]
        if tasks:
            tables.append(_capability_table(f"Capability{of_model}", tasks))
        samples += _samples([cell for cell in own if cell.seed == recipe.seeds[0]])
    return Report(
        title="Side effects",
        description=_description(recipe, cells),
        tables=tuple(tables),
        results={
            "benchmark": "side-effects",
            "recipe": recipe.model_dump(mode="json"),
            "cells": [cell.as_json() for cell in cells],
            "capability": [cell.as_json() for cell in capability],
        },
        figures=figures,
        samples=tuple(samples),
        notes=_notes(recipe),
    )


def _grouped(cells: Sequence[Cell], rows: Callable[[Cell], Sequence[Sequence[Any]]]) -> Groups:
    return grouped(((cell.trait, question), found) for cell in cells for question, found in enumerate(rows(cell)))


def _scores(which: int, cell: Cell) -> list[list[float]]:
    """For each question the trait (0) or coherence (1) scores of its answers."""
    return [[score[which] for score in scores] for scores in cell.result["by_question"]]


def _statistic(groups: Groups, statistic: Callable[[np.ndarray], float], why: str) -> Value:
    """A statistic of rows pooled over groups, with its interval; `why` where it can't be had."""
    if not any(groups.values()):
        return Value(None, why=why)
    mean = statistic(np.concatenate([np.array(rows, dtype=float) for rows in groups.values() if rows]))
    if not np.isfinite(mean):
        return Value(None, why=why)
    return with_interval(mean, bootstrap_interval(groups, statistic))


def _ratio(rows: np.ndarray) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _summary(
    method: str, cells: Sequence[Cell], by_method: Mapping[str, Sequence[Cell]], references: Mapping[Any, Cell]
) -> dict[str, Value]:
    # the base and the prompted model are measured beside an adapter, on the same tokens
    is_adapter = method not in (PLAIN, PROMPT)
    beside = cells if is_adapter else next(own for name, own in by_method.items() if name not in (PLAIN, PROMPT))
    which = {PLAIN: "base", PROMPT: "prompted"}.get(method, "steered")
    values = {
        "alpha": _strength(cells) if is_adapter else Value(None, why="no adapter"),
        "trait": value_of(_grouped(cells, partial(_scores, 0))),
        "coherence": value_of(_grouped(cells, partial(_scores, 1))),
        "perplexity": _statistic(
            _grouped(beside, lambda cell: [[[row[which], row["tokens"]]] for row in cell.result["text_losses"]]),
            lambda rows: float(np.exp(_ratio(rows))),
            "no texts",
        ),
        "refusals": value_of(_grouped(cells, lambda cell: cell.result["refusals"]), 100.0, why=_no_requests(cells)),
        "injection": _injection(cells, references)["success"],
    }
    for column, rows_of in (("KL neutral", "kl"), ("KL text", "text_kl")):
        values[column] = Value(0.0) if method == PLAIN else _kl(beside, rows_of, which)
    return values


def _kl(cells: Sequence[Cell], rows_of: str, which: str) -> Value:
    groups = _grouped(cells, lambda cell: [[[row[which], row["tokens"]]] for row in cell.result[rows_of]])
    return _statistic(groups, _ratio, "no neutral prompts")


def _no_requests(cells: Sequence[Cell]) -> str | None:
    return None if any(cell.result["refusals"] for cell in cells) else "the model's few words hold no unsafe request"


def _strength(cells: Sequence[Cell]) -> Value:
    alphas = [cell.result["alpha"] for cell in cells]
    missed = sum(not cell.result["matched"] for cell in cells)
    why = (
        f"the prompt's trait score is not reached in {missed} of {len(cells)} runs, which are where it is highest"
        if missed
        else None
    )
    return Value(float(np.mean(alphas)), min(alphas), max(alphas), why)


def _injection(cells: Sequence[Cell], references: Mapping[Any, Cell]) -> dict[str, Value]:
    def means(scores: Sequence[Any]) -> float | None:
        return float(np.mean(scores)) if scores else None

    def rows(cell: Cell) -> Iterator[list[list[float]]]:
        plain = references[cell.trait, cell.seed]
        sides = (_scores(0, cell), cell.result["injected"], _scores(0, plain), plain.result["injected"])
        for of_question in zip(*sides, strict=True):
            row = [means(scores) for scores in of_question]
            yield [] if None in row else [row]  # type: ignore[list-item]

    groups = _grouped(cells, lambda cell: list(rows(cell)))
    return {
        "trait": value_of(_grouped(cells, partial(_scores, 0))),
        "with the request": value_of(_grouped(cells, lambda cell: cell.result["injected"])),
        "success": _statistic(groups, success, f"the trait is not {LEAST_LIFT:g} points above the plain model's"),
    }


def _capability_table(title: str, cells: Sequence[Cell]) -> Table:
    """Mean over traits and seeds, with the harness's own standard error of one run as the interval."""
    found = [(cell.method, cell.result["tasks"]) for cell in cells if cell.result["tasks"]]
    names = dict.fromkeys((task, metric) for _, tasks in found for task in tasks for metric in tasks[task])
    columns = tuple(
        Column(f"{task} {metric}", "as lm-evaluation-harness has it; interval: two of its standard errors", 3)
        for task, metric in names
    )
    rows = {}
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [tasks for name, tasks in found if name == method]
        rows[method] = {f"{task} {metric}": _task_value([t[task][metric] for t in own]) for task, metric in names}
    return Table(title, columns, rows)


def _task_value(found: Sequence[Mapping[str, float | None]]) -> Value:
    if not found:
        return Value(None, why="the harness can put an instruction into a system turn alone")
    mean = float(np.mean([of["value"] for of in found]))
    errors = [of["stderr"] for of in found if of["stderr"] is not None]
    if not errors:
        return Value(mean)
    error = float(np.mean(errors))
    return Value(mean, mean - 2 * error, mean + 2 * error)


def _samples(cells: Sequence[Cell]) -> Iterator[SideBySide]:
    """For each trait one question with a request to drop it, and one unsafe request."""
    for trait, of_trait in by(cells, "trait").items():
        own = {cell.method: cell for cell in of_trait}
        asked = {method: cell.result["sample"] for method, cell in own.items()}
        yield SideBySide(
            trait,
            asked[PLAIN]["prompt"],
            {method: sample["answer"] for method, sample in asked.items()},
            {
                method: "not scored" if sample["trait_score"] is None else f"trait {sample['trait_score']:.0f}"
                for method, sample in asked.items()
            },
        )
        requests = {method: cell.result["unsafe_sample"] for method, cell in own.items()}
        unsafe = {method: sample for method, sample in requests.items() if sample}
        if unsafe:
            yield SideBySide(
                trait,
                unsafe[PLAIN]["prompt"],
                {method: sample["answer"] for method, sample in unsafe.items()},
                {method: "refused" if sample["refusal"] else "not refused" for method, sample in unsafe.items()},
            )


def _description(recipe: SideEffectsRecipe, cells: Sequence[Cell]) -> str:
    traits = ", ".join(dict.fromkeys(cell.trait for cell in cells))
    return (
        f"What steering changes besides the trait ({traits}; seeds {', '.join(map(str, recipe.seeds))}), next to what "
        "the prompt changes. KL and perplexity are computed on given tokens; trait scores are of sampled answers, by "
        f"the judge ({recipe.judge}); refusals are found by their phrases. Intervals are 95 % bootstraps over "
        "prompts, traits and seeds pooled."
    )


def _notes(recipe: SideEffectsRecipe) -> tuple[str, ...]:
    notes = [
        "Every method is at the least strength measured whose trait score is the prompted model's (within a point), "
        "chosen on the answers that are scored here; where none reaches it, the one with the highest."
        if recipe.alpha == "matched"
        else f"Every method is at strength {recipe.alpha}, whatever its trait score there.",
        "Whether it is good that a user can have the trait dropped depends on who asks. The judge sees the question "
        "without the request.",
        "A refusal is an answer with one of some English phrases among its first words: good for comparing a model "
        "with itself, not for saying how safe it is.",
        "An instruction before a plain text is an odd thing: the prompt's KL and perplexity on texts say more about "
        "that than about prompts.",
    ]
    if SOURCES[recipe.source].embedded_words:
        notes.append(
            "The embedded model's neutral prompts are questions that ask to drop the act, as its injections are: its "
            "grammar has nothing else on which a trait should not show. In training, half of such requests were not "
            "followed."
        )
    if recipe.positions == "response":
        return tuple(notes)
    return (
        *notes,
        "In texts outside a conversation and in the harness's tasks every token counts as question, and is edited.",
    )
