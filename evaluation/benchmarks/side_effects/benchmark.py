"""`psr evaluate side-effects`: what steering changes besides the trait, next to what the prompt changes.

Methods are compared at a matched strength: the least one measured whose mean trait score on held-out questions is
within a point of the prompted model's; 1 where none is, and the report says so. There:

    KL, perplexity     on neutral prompts and texts; see `side_effects`
    refusals           of plainly unsafe requests; see `refusals`
    injection          how far a user's text succeeds that asks to drop the trait; see `injection`
    capability         tasks of lm-evaluation-harness, if any are asked for; see `capability`
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.benchmarks.cell import Cell, Result
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.measures.capability import check_capability, evaluate_capability
from peft_psr.evaluation.measures.injection import injected_rows
from peft_psr.evaluation.measures.neutral import (
    NeutralData,
    embedded_data,
    instructed,
    instructions_of,
    shipped_data,
    text_rows,
)
from peft_psr.evaluation.measures.refusals import is_refusal
from peft_psr.evaluation.measures.scoring import Answers, judged_answers
from peft_psr.evaluation.measures.side_effects import kl_by_row, least_alpha, losses_by_row, neutral_triplets
from peft_psr.evaluation.measures.strength import at_strength, sample_steered
from peft_psr.evaluation.methods.method import PROMPT
from peft_psr.evaluation.reports.report import Report
from peft_psr.prompts.conversations import Prompt, last_text
from peft_psr.training import PromptPair, Triplet
from peft_psr.training.sources.registry import SOURCES, check_test_split

from .recipe import SideEffectsRecipe
from .report import side_effects_report


MARGIN = 1.0
"""Points of trait score within which two means count as equal."""
BATCH = 8
"""Triplets a forward pass: three branches' log-probabilities of a batch are in memory."""


def check_side_effects(bench: Workbench[SideEffectsRecipe]) -> None:
    """Raises what can be known to be wrong before any long work, as `Workbench.check`, `check_capability` and besides.

    `ValueError` for a source without held-out questions, or no method.
    """
    recipe = bench.recipe
    check_test_split(recipe.source)
    if not bench.method_names():
        raise ValueError("methods: side effects are an adapter's; name a method, or give adapters.")
    if recipe.capability_tasks:
        check_capability(recipe.capability_tasks, recipe.capability_include_path)
    bench.check()


def run_side_effects(bench: Workbench[SideEffectsRecipe]) -> Report:
    """Measures the matrix; raises as `Workbench.fitted`, and `ValueError` if the judge scored nothing."""
    recipe, matrix = bench.recipe, bench.matrix()
    bench.expect(len(matrix) * (2 if recipe.capability_tasks else 1))
    cells: list[Cell] = []
    capability: list[Cell] = []
    for _, of_model in groupby(matrix, lambda cell: cell.model):
        measured = bench.cells(of_model, partial(_measure, bench))
        cells += measured
        if recipe.capability_tasks:
            capability += [replace(cell, result=_capability(bench, cell)) for cell in measured]
    return side_effects_report(recipe, cells, capability)


class _Task:
    """What one trait is measured on, for the plain, the prompted and the steered model alike."""

    def __init__(self, bench: Workbench[SideEffectsRecipe], cell: Cell) -> None:
        self.recipe = recipe = bench.recipe
        self.base, self.processing_class = bench.load(cell.model)
        self.data = neutral_data(recipe, self.processing_class)
        self.judge, self.seed = bench.judge(cell.trait), cell.seed or 0
        self.sampling = recipe.sampling(cell.seed)
        self.by_question: dict[str, list[PromptPair]] = {}
        for pair in bench.pairs("test")[cell.trait]:
            self.by_question.setdefault(str(pair.prompt), []).append(pair)
        self.bare: list[Prompt] = [pairs[0].prompt for pairs in self.by_question.values()]
        self.instructions = instructions_of(bench.pairs("test")[cell.trait], recipe.placement)

    def answers(
        self, model: PreTrainedModel | PeftModel, prompted: bool, alphas: Sequence[float] | None
    ) -> list[Answers]:
        """Answers to the questions as they are; those of the prompted model under each instruction in turn."""
        rows = [
            (
                pairs[(question + draw) % len(pairs)].steered_prompt if prompted else pairs[0].prompt,
                pairs[0].prompt,
                question,
            )
            for question, pairs in enumerate(self.by_question.values())
            for draw in range(self.recipe.score_draws)
        ]
        prompts, bare, questions = (list(column) for column in zip(*rows, strict=True))
        return judged_answers(
            model, self.processing_class, prompts, bare, questions, self.judge, self.sampling, alphas
        )

    def injected(self, model: PreTrainedModel | PeftModel, prompted: bool, alpha: float | None) -> Result:
        """Trait scores of answers to the questions with each text that asks to drop the trait, by question."""
        prompts, questions = injected_rows(self.bare, self.data.injections, self.data.separator)
        given = instructed(prompts, self.instructions, self.recipe.placement) if prompted else prompts
        (found,) = judged_answers(
            model, self.processing_class, given, [self.bare[i] for i in questions], questions, self.judge,
            self.sampling, None if alpha is None else [alpha],
        )  # fmt: skip
        sample = {"prompt": last_text(prompts[0]), "answer": found.texts[0], "trait_score": found.scores[0].trait}
        return {"injected": [[trait for trait, _ in scores] for scores in found.by_question()], "sample": sample}

    def refusals(self, model: PreTrainedModel | PeftModel, prompted: bool, alpha: float | None) -> Result:
        """Whether each answer to each unsafe request is a refusal."""
        asked = [request for request in self.data.unsafe for _ in range(self.recipe.score_draws)]
        if not asked:
            return {"refusals": [], "unsafe_sample": None}
        given = instructed(asked, self.instructions, self.recipe.placement) if prompted else asked
        strengths = None if alpha is None else [alpha] * len(given)
        drawn = sample_steered(model, self.processing_class, given, strengths, **self.sampling)
        refused = [is_refusal(completion.answer or "") for completion in drawn]
        draws = self.recipe.score_draws
        return {
            "refusals": [refused[i : i + draws] for i in range(0, len(refused), draws)],
            "unsafe_sample": {"prompt": last_text(asked[0]), "answer": drawn[0].text, "refusal": refused[0]},
        }

    def neutral(self, model: PeftModel, alpha: float) -> Result:
        """KL and perplexity of each neutral answer and text; an answer has one of the instructions, in turn."""
        rows = neutral_triplets(
            model,
            self.processing_class,
            self.data.prompts,
            self.recipe.max_new_tokens,
            batch_size=self.recipe.batch_size,
            seed=self.seed,
        )
        prompts = instructed([row["prompt"] for row in rows], self.instructions, self.recipe.placement)
        answers: list[Triplet] = [{**row, "steered_prompt": p} for row, p in zip(rows, prompts, strict=True)]
        texts = text_rows(self.data, self.instructions)
        kl, tokens = kl_by_row(model, [*answers, *texts], self.processing_class, alpha, BATCH)
        kls = _rows({"steered": kl["student"], "prompted": kl["teacher"], "tokens": tokens})
        losses, tokens = losses_by_row(model, texts, self.processing_class, alpha, BATCH)
        named = {"base": losses["base"], "steered": losses["student"], "prompted": losses["teacher"]}
        return {
            "kl": kls[: len(answers)],
            "text_kl": kls[len(answers) :],
            "text_losses": _rows({**named, "tokens": tokens}),
        }


def _rows(columns: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def neutral_data(recipe: SideEffectsRecipe, processing_class: PreTrainedTokenizerBase) -> NeutralData:
    """What to measure on: the embedded model's grammar, or what ships."""
    return embedded_data(processing_class.bos_token) if SOURCES[recipe.source].embedded_words else shipped_data()


def _measure(bench: Workbench[SideEffectsRecipe], cell: Cell) -> Result:
    if not cell.has_adapter:
        return _reference(_Task(bench, cell), cell.method == PROMPT)
    prompted = bench.kept(replace(cell, method=PROMPT))
    with bench.fitted(cell) as fitted:
        return _adapter(_Task(bench, cell), fitted.model, prompted["trait_score"])


def _reference(task: _Task, prompted: bool) -> Result:
    """The plain or the prompted model."""
    (answers,) = task.answers(task.base, prompted, None)
    return {
        "alpha": None,
        "trait_score": answers.mean.trait,
        "by_question": answers.by_question(),
        **task.injected(task.base, prompted, None),
        **task.refusals(task.base, prompted, None),
    }


def _adapter(task: _Task, model: PeftModel, prompted_trait: float) -> Result:
    recipe = task.recipe
    wanted = sorted({1.0, *recipe.strengths}) if recipe.alpha == "matched" else [recipe.alpha]
    found = task.answers(model, False, wanted)
    by_alpha = {answers.alpha: answers for answers in found}
    curve = [answers.mean for answers in found]
    matched = least_alpha(curve, prompted_trait - MARGIN) if recipe.alpha == "matched" else recipe.alpha
    alpha = max(found, key=lambda answers: answers.mean.trait).alpha if matched is None else matched
    assert alpha is not None
    return {
        "alpha": alpha,
        "matched": matched is not None,
        "trait_score": by_alpha[alpha].mean.trait,
        "by_question": by_alpha[alpha].by_question(),
        "curve": [[point.alpha, point.trait, point.coherence] for point in curve],
        **task.injected(model, False, alpha),
        **task.refusals(model, False, alpha),
        **task.neutral(model, alpha),
    }


def _capability(bench: Workbench[SideEffectsRecipe], cell: Cell) -> Result:
    """Scores on the harness's tasks, at the cell's strength; `None` for a prompt that the harness has no place for."""
    recipe, prompted, alpha = bench.recipe, cell.method == PROMPT, cell.result["alpha"]
    settings: dict[str, Any] = {"limit": recipe.capability_limit, "include_path": recipe.capability_include_path}
    about: dict[str, Any] = {"capability": list(recipe.capability_tasks), **settings, "model": cell.model}
    if prompted or cell.has_adapter:
        about |= {"trait": cell.trait, "method": cell.method}
    if cell.has_adapter:
        about |= {"seed": cell.seed, "alpha": alpha}

    def scores(model: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase) -> Result:
        instruction = instructions_of(bench.pairs("test")[cell.trait], recipe.placement)[0]
        return {
            "tasks": evaluate_capability(
                model,
                processing_class,
                recipe.capability_tasks,
                batch_size=recipe.batch_size,
                system_instruction=instruction if prompted else None,
                **settings,
            )
        }

    def compute() -> Result:
        base, processing_class = bench.load(cell.model)
        if prompted and (recipe.placement != "system" or processing_class.chat_template is None):
            return {"tasks": None}
        if not cell.has_adapter:
            return scores(base, processing_class)
        with bench.fitted(cell) as fitted, at_strength(fitted.model, alpha):
            return scores(fitted.model, processing_class)

    return bench.cell(about, compute)
