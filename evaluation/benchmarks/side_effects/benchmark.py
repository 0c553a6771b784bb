"""`psr evaluate side-effects`: what steering changes besides the trait, next to what the prompt changes.

Methods are compared at a matched strength: the least one measured whose mean trait score on held-out questions is
within a point of the prompted model's; 1 where none is, and the report says so. There:

    KL, perplexity     on neutral prompts and texts; see `side_effects`
    refusals           of plainly unsafe requests; see `refusals`
    injection          how far a user's text succeeds that asks to drop the trait; see `injection`
    capability         tasks of lm-evaluation-harness, if any are asked for; see `capability`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log
from typing import Any, Literal

from peft import PeftModel
from pydantic import Field

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, PositiveAlpha, PositiveAlphas
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
from peft_psr.evaluation.measures.side_effects import least_alpha, neutral_kl, neutral_triplets, text_perplexity
from peft_psr.evaluation.measures.strength import at_strength, sample_steered
from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.report import Report
from peft_psr.prompts.conversations import Prompt, last_text
from peft_psr.training import PromptPair, Triplet
from peft_psr.training.runs.recipe_fields import FREE, Count, Names, Place
from peft_psr.training.sources.registry import SOURCES, check_test_split

from .report import side_effects_report


MARGIN = 1.0
"""Points of trait score within which two means count as equal."""


class SideEffectsRecipe(EvaluateRecipe):
    """What `psr evaluate side-effects` measures. Each field is an option of it too."""

    alpha: Literal["matched"] | PositiveAlpha = Field(
        "matched",
        description="Strength to compare at: matched, where the trait is the prompted model's, or a number.",
    )
    strengths: PositiveAlphas = Field(
        (0.06, 0.12, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0),
        description="Strengths among which the matched one is looked for.",
    )
    score_draws: Count = Field(4, description="Answers to each held-out question, and to each unsafe request.")
    capability_tasks: Names = Field(
        (), json_schema_extra=FREE, description="Tasks of lm-evaluation-harness, with commas between them."
    )
    capability_limit: Count | None = Field(
        None, json_schema_extra=FREE, description="At most so many questions of each such task."
    )
    capability_include_path: Place | None = Field(
        None, json_schema_extra=FREE, description="Folder with such tasks of your own, as YAML files."
    )


def check_side_effects(bench: Workbench) -> None:
    """Raises what can be known to be wrong before any long work.

    Raises:
        FileNotFoundError: there is no folder of tasks.
        ImportError: tasks are asked for and lm-evaluation-harness is not installed.
        ValueError: a source without held-out questions, no method, no such task, or what `Workbench.check` finds.
    """
    recipe = _recipe(bench)
    check_test_split(recipe.source)
    if not bench.method_names():
        raise ValueError("methods: side effects are an adapter's; name a method, or give adapters.")
    if recipe.capability_tasks:
        check_capability(recipe.capability_tasks, recipe.capability_include_path)
    bench.check()


def run_side_effects(bench: Workbench) -> Report:
    """Measures every method on every trait of every model, with every seed.

    Raises:
        OSError: a model or an adapter can't be had.
        ValueError: a method can't use the triplets, or the judge scored nothing.
    """
    recipe = _recipe(bench)
    methods = bench.method_names()
    of_capability = bool(recipe.capability_tasks)
    bench.expect(len(recipe.models) * len(bench.traits) * len(recipe.seeds) * (2 + len(methods)) * (1 + of_capability))
    cells, capability = [], []
    for model in recipe.models:
        for trait in bench.traits:
            for seed in recipe.seeds:
                prompted_trait = 0.0
                for method in (PLAIN, PROMPT, *methods):
                    key: dict[str, Any] = {"model": model, "trait": trait, "method": method, "seed": seed}
                    if method in (PLAIN, PROMPT):
                        result = bench.cell(key, partial(_reference, bench, **key))
                        prompted_trait = result["trait_score"]
                    else:
                        result = bench.cell(key, partial(_method, bench, **key, prompted_trait=prompted_trait))
                    cells.append({**key, **result})
                    if of_capability:
                        capability.append({**key, "tasks": _capability(bench, **key, alpha=result["alpha"])})
    return side_effects_report(recipe, recipe.alpha, cells, capability)


class _Task:
    """What one trait is measured on, for the plain, the prompted and the steered model alike."""

    def __init__(self, bench: Workbench, model: str, trait: str, seed: int) -> None:
        self.recipe = recipe = _recipe(bench)
        self.base, self.processing_class = bench.load(model)
        self.data = neutral_data(recipe, self.processing_class)
        self.judge, self.seed = bench.judge(trait), seed
        self.by_question: dict[str, list[PromptPair]] = {}
        for pair in bench.pairs("test")[trait]:
            self.by_question.setdefault(str(pair.prompt), []).append(pair)
        self.bare: list[Prompt] = [pairs[0].prompt for pairs in self.by_question.values()]
        self.instructions = instructions_of(bench.pairs("test")[trait], recipe.placement)

    @property
    def sampling(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "max_new_tokens": recipe.max_new_tokens, "temperature": recipe.temperature,
            "batch_size": recipe.batch_size, "seed": self.seed,
        }  # fmt: skip

    def answers(self, model, prompted: bool, alphas: Sequence[float] | None) -> list[Answers]:
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

    def injected(self, model, prompted: bool, alpha: float | None) -> dict[str, Any]:
        """Trait scores of answers to the questions with each text that asks to drop the trait, by question."""
        prompts, questions = injected_rows(self.bare, self.data.injections, self.data.separator)
        given = instructed(prompts, self.instructions, self.recipe.placement) if prompted else prompts
        (found,) = judged_answers(
            model, self.processing_class, given, [self.bare[i] for i in questions], questions, self.judge,
            self.sampling, None if alpha is None else [alpha],
        )  # fmt: skip
        sample = {"prompt": last_text(prompts[0]), "answer": found.texts[0], "trait_score": found.scores[0].trait}
        return {"injected": [[trait for trait, _ in scores] for scores in found.by_question()], "sample": sample}

    def refusals(self, model, prompted: bool, alpha: float | None) -> dict[str, Any]:
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

    def neutral(self, model: PeftModel, alpha: float) -> dict[str, Any]:
        """KL and perplexity of each neutral answer and text; an answer has one of the instructions, in turn."""
        rows = neutral_triplets(
            model, self.processing_class, self.data.prompts, self.recipe.max_new_tokens,
            batch_size=self.recipe.batch_size, seed=self.seed,
        )  # fmt: skip
        prompts = instructed([row["prompt"] for row in rows], self.instructions, self.recipe.placement)
        answers: list[Triplet] = [{**row, "steered_prompt": p} for row, p in zip(rows, prompts, strict=True)]
        texts = text_rows(self.data, self.instructions)
        return {
            "kl": [self._kl(model, row, alpha) for row in answers],
            "text_kl": [self._kl(model, row, alpha) for row in texts],
            "text_losses": [self._losses(model, row, alpha) for row in texts],
        }

    def _kl(self, model: PeftModel, row: Triplet, alpha: float) -> dict[str, float]:
        kl = neutral_kl(model, [row], self.processing_class, alpha)
        return {"steered": kl.steered * kl.tokens, "prompted": kl.prompted * kl.tokens, "tokens": kl.tokens}

    def _losses(self, model: PeftModel, row: Triplet, alpha: float) -> dict[str, float]:
        found = text_perplexity(model, [row], self.processing_class, alpha)
        losses = {name: log(getattr(found, name)) * found.tokens for name in ("base", "steered", "prompted")}
        return {**losses, "tokens": found.tokens}


def neutral_data(recipe: SideEffectsRecipe, processing_class) -> NeutralData:
    """What to measure on: the embedded model's grammar, or what ships."""
    return embedded_data(processing_class.bos_token) if SOURCES[recipe.source].embedded_words else shipped_data()


def _reference(bench: Workbench, model: str, trait: str, method: str, seed: int) -> dict[str, Any]:
    """The plain or the prompted model."""
    task, prompted = _Task(bench, model, trait, seed), method == PROMPT
    (answers,) = task.answers(task.base, prompted, None)
    return {
        "alpha": None,
        "trait_score": answers.mean.trait,
        "by_question": answers.by_question(),
        **task.injected(task.base, prompted, None),
        **task.refusals(task.base, prompted, None),
    }


def _method(bench: Workbench, model: str, trait: str, method: str, seed: int, prompted_trait: float) -> dict[str, Any]:
    task, recipe = _Task(bench, model, trait, seed), _recipe(bench)
    wanted = sorted({1.0, *recipe.strengths}) if recipe.alpha == "matched" else [recipe.alpha]
    with bench.fitted(model, trait, method, seed) as fitted:
        found = task.answers(fitted.model, False, wanted)
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
            **task.injected(fitted.model, False, alpha),
            **task.refusals(fitted.model, False, alpha),
            **task.neutral(fitted.model, alpha),
        }


def _capability(
    bench: Workbench, model: str, trait: str, method: str, seed: int, alpha: float | None
) -> dict[str, Any] | None:
    """Scores on the harness's tasks; `None` for a prompt that it can't put where the recipe has it."""
    recipe = _recipe(bench)
    settings: dict[str, Any] = {"limit": recipe.capability_limit, "include_path": recipe.capability_include_path}
    about: dict[str, Any] = {"capability": list(recipe.capability_tasks), **settings, "model": model}
    if method == PROMPT:
        about |= {"trait": trait, "method": method}
    elif method != PLAIN:
        about |= {"trait": trait, "method": method, "seed": seed, "alpha": alpha}

    def compute() -> dict[str, Any]:
        base, processing_class = bench.load(model)
        if method == PROMPT and (recipe.placement != "system" or processing_class.chat_template is None):
            return {"tasks": None}
        instruction = instructions_of(bench.pairs("test")[trait], recipe.placement)[0]

        def scores(of) -> dict[str, Any]:
            system = instruction if method == PROMPT else None
            return {
                "tasks": evaluate_capability(
                    of, processing_class, recipe.capability_tasks, batch_size=recipe.batch_size,
                    system_instruction=system, **settings,
                )
            }  # fmt: skip

        if alpha is None:
            return scores(base)
        with bench.fitted(model, trait, method, seed) as fitted, at_strength(fitted.model, alpha):
            return scores(fitted.model)

    return bench.cell(about, compute)["tasks"]


def _recipe(bench: Workbench) -> SideEffectsRecipe:
    assert isinstance(bench.recipe, SideEffectsRecipe)
    return bench.recipe
