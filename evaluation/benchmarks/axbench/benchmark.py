"""`psr evaluate axbench`: concepts brought into answers to instructions, rated by a language model.

A concept is tried on some instructions. On half of them an adapter answers at every factor (strength alpha); the
factor with the best mean score is then scored on the other half. Sources: AxBench (arXiv 2501.17148); the factors are
those of its configurations (github.com/stanfordnlp/axbench, `steering_factors`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Annotated, Any, Literal, cast

from peft import PeftModel
from pydantic import BeforeValidator, Field, field_validator, model_validator

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.measures.mixed_batches import AdapterCopy, copy_adapter, together
from peft_psr.evaluation.measures.strength import at_strength
from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.report import Report
from peft_psr.training import sample_completions
from peft_psr.training.data.by_trait import folder_name
from peft_psr.training.data.draws import Completion, draw_seed
from peft_psr.training.data.filtering import NO_ANSWER
from peft_psr.training.data.placement import check_placement
from peft_psr.training.judges.ratings import PROMPTS, RatingJudge, Ratings, check_rates
from peft_psr.training.runs.models import load_tokenizer
from peft_psr.training.runs.recipe_fields import Place, split
from peft_psr.training.runs.triplets.assembly import judge_settings
from peft_psr.training.runs.triplets.recipe import JudgeName
from peft_psr.training.sources.axbench import (
    Concept,
    axbench_pairs,
    axbench_triplets,
    read_axbench,
    read_negative_questions,
)

from .questions import Trial, make_trial, read_instructions
from .report import axbench_report


Factor = Annotated[float, Field(gt=0)]
Factors = Annotated[tuple[Factor, ...], Field(min_length=1), BeforeValidator(split)]
CONCEPTS_TOGETHER = 16
"""Concepts whose adapters are on the model at once, for mixed batches."""


class AxBenchRecipe(EvaluateRecipe):
    """What `psr evaluate axbench` measures. Each field is an option of it too."""

    source: Literal["axbench"] = Field("axbench", description="AxBench's concepts.")
    judge: JudgeName = Field(
        description="Where the model runs that judges: on a server, or here. It scores triplets and rates answers."
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(128, description="Longest completion and answer, in tokens.")
    train_alpha: Literal["trait_score"] | float = Field(
        1.0, description="Strength while training: each triplet's trait score / 100, or one number."
    )
    own_answers: bool = Field(
        False,
        description="Train on the data set's own answers, which another model wrote, in place of answers that the "
        "model itself draws on prompts that ask for the concept.",
    )
    questions_data: Place | None = Field(
        None,
        description="File of instructions to try the concepts on, in AlpacaEval's layout or one a line; by default "
        "questions of the data set's shared negatives.",
    )
    test_instructions: Annotated[int, Field(ge=2)] = Field(
        10, description="Instructions for each concept: half to choose the factor on, half to score."
    )
    factors: Factors = Field(
        (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0),
        description="Strengths to choose from, with commas between them.",
    )

    @field_validator("factors")
    @classmethod
    def _by_size(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(factors)))

    @model_validator(mode="after")
    def _check_ratings(self) -> AxBenchRecipe:
        check_rates(self.judge)
        return self

    @model_validator(mode="after")
    def _check_own_answers(self) -> AxBenchRecipe:
        if self.own_answers and self.train_alpha == "trait_score":
            raise ValueError("own_answers: the data set's answers have no trait scores; give train_alpha as a number.")
        if self.own_answers and self.triplets:
            raise ValueError("own_answers and triplets both say what to train on; leave one of them out.")
        return self


def check_axbench(bench: Workbench) -> None:
    """Raises what can be known to be wrong before any long work.

    Raises:
        FileNotFoundError: the data set or the file of instructions is not there.
        ValueError: a file is malformed, a concept is unknown or has too few instructions to be tried on, a model takes
            no instruction where the recipe puts it, or whatever `Workbench.check` finds.
    """
    bench.check()
    names = [folder_name(trial.concept.description) for trial in trials(_recipe(bench))]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"traits: several concepts are described as {twice[0]!r}; name one of them.")
    for model in bench.recipe.models:
        check_placement(load_tokenizer(model, bench.recipe), bench.recipe.placement)


def trials(recipe: AxBenchRecipe) -> list[Trial]:
    """The concepts of a recipe, each with the instructions it is tried on.

    Raises:
        FileNotFoundError, ValueError: as `check_axbench`.
    """
    folder = recipe.data or ""
    concepts = read_axbench(folder, [int(name) for name in recipe.traits] or None)
    questions = read_instructions(recipe.questions_data) if recipe.questions_data else read_negative_questions(folder)
    return [make_trial(concept, questions, recipe.test_instructions, recipe.seed) for concept in concepts]


def run_axbench(bench: Workbench) -> Report:
    """Measures every method on every concept of every model, with every seed.

    Raises:
        ServerError, TooManyFailures: the judge's server refuses, or fails too often.
    """
    recipe = _recipe(bench)
    tried = trials(recipe)
    methods = (PLAIN, PROMPT, *bench.method_names())
    bench.expect(len(recipe.models) * len(tried) * len(recipe.seeds) * len(methods))
    judge = RatingJudge.of(recipe.judge, judge_settings(recipe, bench.folder))
    cells = []
    for model in recipe.models:
        for method in methods:
            for seed in recipe.seeds:
                measure = partial(_measure, bench, judge, model, method, seed)
                for start in range(0, len(tried), CONCEPTS_TOGETHER):
                    group = tried[start : start + CONCEPTS_TOGETHER]
                    known: dict[int, dict[str, Any]] = {}
                    for place, trial in enumerate(group):
                        key = {"model": model, "concept": trial.concept.id, "method": method, "seed": seed}
                        drawn = {"instructions": trial.fingerprint, "trait": trial.concept.description}
                        result = bench.cell({**key, **drawn}, partial(_first, known, measure, group[place:]))
                        cells.append({**key, **result})
    return axbench_report(recipe, cells)


def _recipe(bench: Workbench) -> AxBenchRecipe:
    assert isinstance(bench.recipe, AxBenchRecipe)
    return bench.recipe


def _first(
    known: dict[int, dict[str, Any]],
    measure: Callable[[Sequence[Trial]], dict[int, dict[str, Any]]],
    group: Sequence[Trial],
) -> dict[str, Any]:
    """The first one's cell; the others of its group are measured with it and wait in `known`."""
    wanted = group[0].concept.id
    if wanted not in known:
        known |= measure(group)
    return known[wanted]


@dataclass(frozen=True)
class AnswerTask:
    """An answer to be given.

    Attributes:
        concept: To bring in.
        place: Of the instruction among the concept's, from 0.
        instruction: To answer.
        factor: Strength of the adapter, or `None` without one.
    """

    concept: Concept
    place: int
    instruction: str
    factor: float | None


AnswerFunction = Callable[[Sequence[AnswerTask]], list[Completion]]


def _measure(
    bench: Workbench, judge: RatingJudge, model: str, method: str, seed: int, group: Sequence[Trial]
) -> dict[int, dict[str, Any]]:
    """{concept's id: cell} of one method; adapters that are PSR's answer together, others one after the other."""
    recipe = _recipe(bench)
    base, processing_class = bench.load(model)

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

    if method in (PLAIN, PROMPT):
        return tried_out(group, (), partial(answer, steered=base), judge)

    def mixed(tasks: Sequence[AnswerTask], steered: PeftModel) -> list[Completion]:
        names = [_name(task.concept) for task in tasks]
        return answer(tasks, steered, alpha=[task.factor for task in tasks], adapter_names=names)

    def one_by_one(tasks: Sequence[AnswerTask], steered: PeftModel) -> list[Completion]:
        found: list[Completion] = []
        for factor, some in groupby(tasks, lambda task: task.factor):  # tasks of a factor stand together
            with at_strength(steered, cast(float, factor)):
                found += answer(list(some), steered)
        return found

    cells: dict[int, dict[str, Any]] = {}
    facts: dict[int, dict[str, Any]] = {}
    copies: dict[str, AdapterCopy] = {}
    for trial in group:
        concept = trial.concept
        with _fitted(bench, model, concept, method, seed) as fitted:
            facts[concept.id] = {name: value for name, value in vars(fitted).items() if name != "model"}
            adapter = copy_adapter(fitted.model)
            if adapter is None:
                cells |= tried_out([trial], recipe.factors, partial(one_by_one, steered=fitted.model), judge)
            else:
                copies[_name(concept)] = adapter
    if copies:
        mixable = [trial for trial in group if _name(trial.concept) in copies]
        with together(base, copies) as steered:
            cells |= tried_out(mixable, recipe.factors, partial(mixed, steered=steered), judge)
    return {concept_id: {**cell, **facts[concept_id]} for concept_id, cell in cells.items()}


def _fitted(bench: Workbench, model: str, concept: Concept, method: str, seed: int) -> AbstractContextManager:
    recipe = _recipe(bench)
    if not recipe.own_answers:
        return bench.fitted(model, concept.description, method, seed)
    rows = axbench_triplets(concept, recipe.placement)[: recipe.questions]
    return bench.fitted(model, concept.description, method, seed, triplets=rows, part="own answers")


def _name(concept: Concept) -> str:
    """Of its adapter on the model."""
    return f"concept_{concept.id}"


def tried_out(
    group: Sequence[Trial], factors: Sequence[float], answer: AnswerFunction, judge: RatingJudge
) -> dict[int, dict[str, Any]]:
    """Chooses each concept's factor on one half of its instructions, and scores the other half.

    Args:
        group: The concepts.
        factors: To choose from, the smallest first; none for a model without an adapter.
        answer: Gives the answers, of all concepts in one call.
        judge: Rates them.

    Returns:
        {concept's id: `description`; `instructions`; `factor` (`None` without an adapter, or if none of the answers to
        choose by has a score); `curve` ([factor, mean score or `None`, answers with a score]); and the answers with
        their ratings, to choose by (`choosing`) and to score (`scoring`)}.
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
