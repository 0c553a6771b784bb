"""`psr evaluate axbench`: concepts brought into answers to instructions, rated by a language model.

A concept is tried on some instructions. On half of them an adapter answers at every factor (strength alpha); the
factor with the best mean score is then scored on the other half. Sources: AxBench (arXiv 2501.17148); the factors are
those of its configurations (github.com/stanfordnlp/axbench, `steering_factors`).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, cast

from peft import PeftModel

from peft_psr.evaluation.benchmarks.cell import Cell, Result
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.measures.mixed_batches import AdapterCopy, copy_adapter, together
from peft_psr.evaluation.measures.strength import at_strength
from peft_psr.evaluation.methods.method import PLAIN, PROMPT, Fitted
from peft_psr.evaluation.reports.report import Report
from peft_psr.training import sample_completions
from peft_psr.training.data.by_trait import folder_name
from peft_psr.training.data.draws import Completion, draw_seed
from peft_psr.training.data.filtering import NO_ANSWER
from peft_psr.training.data.placement import check_placement
from peft_psr.training.judges.ratings import PROMPTS, RatingJudge, Ratings
from peft_psr.training.runs.models import load_tokenizer
from peft_psr.training.runs.triplets.assembly import judge_settings
from peft_psr.training.sources.axbench import (
    Concept,
    axbench_pairs,
    axbench_triplets,
    read_axbench,
    read_negative_questions,
)

from .questions import Trial, make_trial, read_instructions
from .recipe import AxBenchRecipe
from .report import axbench_report


CONCEPTS_TOGETHER = 16
"""Concepts whose adapters are on the model at once, for mixed batches."""


def check_axbench(bench: Workbench[AxBenchRecipe]) -> None:
    """Raises what can be known to be wrong before any long work, as `Workbench.check` and besides.

    Raises:
        FileNotFoundError: the data set or the file of instructions is not there.
        ValueError: a file is malformed, a concept is unknown or has too few instructions to be tried on, or a model
            takes no instruction where the recipe puts it.
    """
    bench.check()
    names = [folder_name(trial.concept.description) for trial in trials(bench.recipe)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"traits: several concepts are described as {twice[0]!r}; name one of them.")
    for model in bench.recipe.models:
        check_placement(load_tokenizer(model, bench.recipe), bench.recipe.placement)


def trials(recipe: AxBenchRecipe) -> list[Trial]:
    """The concepts of a recipe, each with the instructions it is tried on; raises as `check_axbench`."""
    folder = recipe.data or ""
    concepts = read_axbench(folder, [int(name) for name in recipe.traits] or None)
    questions = read_instructions(recipe.questions_data) if recipe.questions_data else read_negative_questions(folder)
    return [make_trial(concept, questions, recipe.test_instructions, recipe.seed) for concept in concepts]


def run_axbench(bench: Workbench[AxBenchRecipe]) -> Report:
    """Measures the matrix; `ServerError` or `TooManyFailures` if the judge's server refuses, or fails too often."""
    recipe = bench.recipe
    tried = trials(recipe)
    groups = [
        [_cell(model, method, seed, trial) for trial in tried[start : start + CONCEPTS_TOGETHER]]
        for model in recipe.models
        for method in (PLAIN, PROMPT, *bench.method_names())
        for seed in recipe.seeds
        for start in range(0, len(tried), CONCEPTS_TOGETHER)
    ]
    bench.expect(sum(map(len, groups)))
    by_id = {trial.concept.id: trial for trial in tried}
    measure = partial(_measure, bench, RatingJudge.of(recipe.judge, judge_settings(recipe, bench.folder)), by_id)
    return axbench_report(recipe, bench.cells_together(groups, measure))


def _cell(model: str, method: str, seed: int, trial: Trial) -> Cell:
    more = {"concept": trial.concept.id, "instructions": trial.fingerprint}
    return Cell(model, trial.concept.description, method, seed, more)


@dataclass(frozen=True)
class AnswerTask:
    """An answer to be given, to bring in a concept.

    `place` is the instruction's among the concept's, from 0; `factor` the strength of the adapter, `None` without one.
    """

    concept: Concept
    place: int
    instruction: str
    factor: float | None


AnswerFunction = Callable[[Sequence[AnswerTask]], list[Completion]]


def _measure(
    bench: Workbench[AxBenchRecipe], judge: RatingJudge, trials: Mapping[int, Trial], cells: Sequence[Cell]
) -> list[Result]:
    """Cells of one model, method and seed; adapters that are PSR's answer together, others one after the other."""
    recipe, group = bench.recipe, [trials[cell.more["concept"]] for cell in cells]
    base, processing_class = bench.load(cells[0].model)
    method, seed = cells[0].method, cells[0].seed or 0

    def answer(tasks: Sequence[AnswerTask], steered: Any, **more: Any) -> list[Completion]:
        asked = [replace(task.concept, inputs=(task.instruction,)) for task in tasks]
        pairs = [axbench_pairs(concept, recipe.placement)[0] for concept in asked]
        return sample_completions(
            steered,
            processing_class,
            [pair.steered_prompt if method == PROMPT else pair.prompt for pair in pairs],
            recipe.max_new_tokens,
            recipe.temperature,
            recipe.batch_size,
            # the same for every method and factor, so that what is compared differs by these alone
            seeds=[draw_seed(seed, f"axbench/{task.concept.id}/{task.place}") for task in tasks],
            **more,
        )

    if not cells[0].has_adapter:
        found = tried_out(group, (), partial(answer, steered=base), judge)
        return [found[trial.concept.id] for trial in group]

    def mixed(tasks: Sequence[AnswerTask], steered: PeftModel) -> list[Completion]:
        names = [_name(task.concept) for task in tasks]
        return answer(tasks, steered, alpha=[task.factor for task in tasks], adapter_names=names)

    def one_by_one(tasks: Sequence[AnswerTask], steered: PeftModel) -> list[Completion]:
        drawn: list[Completion] = []
        for factor, some in groupby(tasks, lambda task: task.factor):  # tasks of a factor stand together
            with at_strength(steered, cast(float, factor)):
                drawn += answer(list(some), steered)
        return drawn

    results: dict[int, Result] = {}
    facts: dict[int, dict[str, Any]] = {}
    copies: dict[str, AdapterCopy] = {}
    for cell, trial in zip(cells, group, strict=True):
        concept = trial.concept
        with _fitted(bench, cell, concept) as fitted:
            facts[concept.id] = {name: value for name, value in vars(fitted).items() if name != "model"}
            adapter = copy_adapter(fitted.model)
            if adapter is None:
                results |= tried_out([trial], recipe.factors, partial(one_by_one, steered=fitted.model), judge)
            else:
                copies[_name(concept)] = adapter
    if copies:
        mixable = [trial for trial in group if _name(trial.concept) in copies]
        with together(base, copies) as steered:
            results |= tried_out(mixable, recipe.factors, partial(mixed, steered=steered), judge)
    return [{**results[trial.concept.id], **facts[trial.concept.id]} for trial in group]


def _fitted(bench: Workbench[AxBenchRecipe], cell: Cell, concept: Concept) -> AbstractContextManager[Fitted]:
    if not bench.recipe.own_answers:
        return bench.fitted(cell)
    rows = axbench_triplets(concept, bench.recipe.placement)[: bench.recipe.questions]
    return bench.fitted(cell, rows, "own answers")


def _name(concept: Concept) -> str:
    """Of its adapter on the model."""
    return f"concept_{concept.id}"


def tried_out(
    group: Sequence[Trial], factors: Sequence[float], answer: AnswerFunction, judge: RatingJudge
) -> dict[int, dict[str, Any]]:
    """Chooses each concept's factor on one half of its instructions, and scores the other half.

    There are `factors`, the smallest first, but for a model without an adapter. Returns {concept's id: `description`;
    `instructions`; `factor` (`None` without an adapter, or if none of the answers to choose by has a score); `curve`
    ([factor, mean score or `None`, answers with a score]); and the answers with their ratings, to choose by
    (`choosing`) and to score (`scoring`)}.
    """
    choosing = _rated(
        [
            AnswerTask(trial.concept, place, instruction, factor)
            for trial in group
            for factor in factors
            for place, instruction in enumerate(trial.choosing)
        ],
        answer,
        judge,
    )
    cells: dict[int, dict[str, Any]] = {}
    tasks = []
    for trial in group:
        rows = choosing.get(trial.concept.id, [])
        curve = mean_scores(rows, factors)
        # the smallest of equally good ones
        best = max(((mean, -factor) for factor, mean, _ in curve if mean is not None), default=None)
        chosen = None if best is None else -best[1]
        cells[trial.concept.id] = {
            "description": trial.concept.description,
            "instructions": {"choosing": list(trial.choosing), "scoring": list(trial.scoring)},
            "factor": chosen,
            "curve": curve,
            "choosing": rows,
        }
        if chosen is not None or not factors:
            places = range(len(trial.choosing), len(trial.choosing) + len(trial.scoring))
            tasks += [
                AnswerTask(trial.concept, place, instruction, chosen)
                for place, instruction in zip(places, trial.scoring, strict=True)
            ]
    scoring = _rated(tasks, answer, judge)
    return {concept_id: {**cell, "scoring": scoring.get(concept_id, [])} for concept_id, cell in cells.items()}


def mean_scores(rows: Sequence[dict[str, Any]], factors: Sequence[float]) -> list[tuple[float, float | None, int]]:
    """[(factor, mean score of its answers that have one or `None`, how many have)]."""
    found = []
    for factor in factors:
        scores = [row["score"] for row in rows if row["factor"] == factor and row["score"] is not None]
        found.append((factor, statistics.fmean(scores) if scores else None, len(scores)))
    return found


def _rated(tasks: Sequence[AnswerTask], answer: AnswerFunction, judge: RatingJudge) -> dict[int, list[dict[str, Any]]]:
    """{concept's id: its answers with their ratings}, in the order of the tasks."""
    if not tasks:
        return {}
    completions = answer(tasks)
    asked = [
        (task.concept.description, task.instruction, completion.answer)
        for task, completion in zip(tasks, completions, strict=True)
        if completion.answer is not None
    ]
    found = iter(judge(asked))
    no_rating = Ratings({}, dict.fromkeys(PROMPTS, NO_ANSWER))
    ratings = [no_rating if completion.answer is None else next(found) for completion in completions]
    rows: dict[int, list[dict[str, Any]]] = {}
    for task, completion, rated in zip(tasks, completions, ratings, strict=True):
        row = {"instruction": task.instruction, "factor": task.factor, "answer": completion.text}
        row |= {"truncated": completion.truncated, "score": rated.score, **asdict(rated)}
        rows.setdefault(task.concept.id, []).append(row)
    return rows
