"""`psr evaluate persona`: trait and coherence on held-out questions, at alpha 1 and where coherence is a target.

    TA@C80    mean trait score at the largest strength whose mean coherence is 80
    TA@Cp     the same where coherence is the prompted model's

Scores are the judge's, 0-100. Strengths are found by bisection on the same answers that are then reported, as METHOD's
protocol has it. Sources: Persona Vectors (arXiv 2507.21509) for traits and questions; arXiv 2605.03907 for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from pydantic import Field, field_validator

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, Positions, PositiveAlphas
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.inspection.token_map import map_tokens
from peft_psr.evaluation.measures.calibration import Calibration, calibrate_alpha
from peft_psr.evaluation.measures.faithfulness import intervention_strength, prompt_recovery, relative_rmse
from peft_psr.evaluation.measures.scoring import Answers, SteeringScore, judged_answers
from peft_psr.evaluation.measures.strength import at_strength, has_lora
from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.report import Report
from peft_psr.training import Triplet, TripletCollator
from peft_psr.training.runs.recipe_fields import Count
from peft_psr.training.runs.triplets.run import NothingKeptError
from peft_psr.training.sources.registry import check_test_split

from .report import persona_report


MAX_ALPHA = 64.0
"""Largest strength searched: some methods count theirs in standard deviations."""
SHOWN = 48
"""Tokens, from the last one of the prompt on, of the completion that is shown token by token."""
SAMPLED = 2
"""Questions of each trait whose first answer is kept to be read."""


class PersonaRecipe(EvaluateRecipe):
    """What `psr evaluate persona` measures. Each field is an option of it too."""

    positions: Positions = Field("question_and_response", description="Edited tokens.")
    strengths: PositiveAlphas = Field(
        (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), description="Strengths to measure before any are searched for."
    )
    calibration_steps: Count = Field(8, description="Further strengths tried for each of TA@C80 and TA@Cp.")
    score_draws: Count = Field(10, description="Answers to each held-out question at each strength.")

    @field_validator("strengths")
    @classmethod
    def _with_one(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({1.0, *strengths}))


def check_persona(bench: Workbench) -> None:
    """Raises what can be known to be wrong before any long work.

    Raises:
        ValueError: a source without held-out questions, or whatever `Workbench.check` finds.
    """
    check_test_split(bench.recipe.source)
    bench.check()


def run_persona(bench: Workbench) -> Report:
    """Measures every method on every trait of every model, with every seed.

    A trait of which no triplet was kept is left out, and the report says so.

    Raises:
        ConnectionError: the judge failed on answers after every retry.
        ValueError: the judge scored nothing, or no trait is left.
    """
    recipe = bench.recipe
    methods = bench.method_names()
    bench.expect(len(recipe.models) * len(bench.traits) * len(recipe.seeds) * (2 + len(methods)))
    cells: list[dict[str, Any]] = []
    left_out = []
    for model in recipe.models:
        for trait in bench.traits:
            try:
                if recipe.methods:
                    bench.triplets(model, trait)
            except NothingKeptError as error:
                left_out.append(f"{trait} of {model} is left out: {error}")
                continue
            for seed in recipe.seeds:
                prompted = 0.0
                for method in (PLAIN, PROMPT, *methods):
                    key: dict[str, Any] = {"model": model, "trait": trait, "method": method, "seed": seed}
                    if method in (PLAIN, PROMPT):
                        result = bench.cell(key, partial(_reference, bench, **key))
                        prompted = result["alpha1"]["coherence"]
                    else:
                        result = bench.cell(key, partial(_method, bench, **key, prompted_coherence=prompted))
                    cells.append({**key, **result})
    if not cells:
        raise ValueError(" ".join(left_out))
    return persona_report(recipe, cells, left_out)


class _Scorer:
    """Answers of a model to a trait's held-out questions, kept by strength."""

    def __init__(self, bench: Workbench, trait: str, seed: int, prompted: bool = False) -> None:
        pairs, recipe = bench.pairs("test")[trait], bench.recipe
        assert isinstance(recipe, PersonaRecipe)
        bare: list[Any] = []
        for pair in pairs:
            if pair.prompt not in bare:
                bare.append(pair.prompt)
        asked = [(p.steered_prompt, p.prompt) for p in pairs] if prompted else [(prompt, prompt) for prompt in bare]
        rows = [row for row in asked for _ in range(recipe.score_draws)]
        self.prompts, self.bare = [row[0] for row in rows], [row[1] for row in rows]
        self.questions = [bare.index(prompt) for prompt in self.bare]
        self.judge = bench.judge(trait)
        self.sampling = {
            "max_new_tokens": recipe.max_new_tokens, "temperature": recipe.temperature,
            "batch_size": recipe.batch_size, "seed": seed,
        }  # fmt: skip
        self.seen: dict[float | None, Answers] = {}

    def measure(self, model, processing_class, alphas: Sequence[float] | None) -> list[SteeringScore]:
        """Scores at each strength."""
        found = judged_answers(
            model, processing_class, self.prompts, self.bare, self.questions, self.judge, self.sampling, alphas
        )
        self.seen |= {answers.alpha: answers for answers in found}
        return [answers.mean for answers in found]

    def unscored(self) -> list[int]:
        """How many answers the judge gave no usable score, and how many there are."""
        scores = [score for answers in self.seen.values() for score in answers.scores]
        return [sum(None in (score.trait, score.coherence) for score in scores), len(scores)]

    def samples(self, alpha: float | None) -> list[dict[str, Any]]:
        """The first answer to each of the first questions."""
        answers = self.seen[alpha]
        kept = []
        for question in range(min(SAMPLED, max(answers.questions) + 1)):
            i = answers.questions.index(question)
            score = answers.scores[i]
            kept.append(
                {
                    "prompt": self.bare[i],
                    "answer": answers.texts[i],
                    "alpha": alpha,
                    "trait_score": score.trait,
                    "coherence_score": score.coherence,
                }  # fmt: skip
            )
        return kept


def _reference(bench: Workbench, model: str, trait: str, method: str, seed: int) -> dict[str, Any]:
    """The plain or the prompted model."""
    base, processing_class = bench.load(model)
    scorer = _Scorer(bench, trait, seed, prompted=method == PROMPT)
    (score,) = scorer.measure(base, processing_class, None)
    return {
        "alpha1": asdict(score),
        "by_question": {"alpha1": scorer.seen[None].by_question()},
        "unscored": scorer.unscored(),
        "samples": scorer.samples(None),
    }


def _method(
    bench: Workbench, model: str, trait: str, method: str, seed: int, prompted_coherence: float
) -> dict[str, Any]:
    recipe = bench.recipe
    assert isinstance(recipe, PersonaRecipe)
    _, processing_class = bench.load(model)
    with bench.fitted(model, trait, method, seed) as fitted:
        scorer = _Scorer(bench, trait, seed)
        curve = scorer.measure(fitted.model, processing_class, recipe.strengths)

        def score(alpha: float) -> SteeringScore:
            return scorer.measure(fitted.model, processing_class, [alpha])[0]

        c80 = calibrate_alpha(score, 80.0, max_steps=recipe.calibration_steps, max_alpha=MAX_ALPHA, curve=curve)
        cp = calibrate_alpha(
            score, prompted_coherence, max_steps=recipe.calibration_steps, max_alpha=MAX_ALPHA, curve=c80.curve
        )
        held_out = bench.held_out(model, trait)
        recovery = prompt_recovery(fitted.model, held_out, processing_class)
        rmse = relative_rmse(fitted.model, held_out, processing_class)
        example = _example(fitted.model, processing_class, held_out[0])
    at = {"alpha1": 1.0, "c80": c80.alpha, "cp": cp.alpha}
    return {
        "alpha1": asdict(scorer.seen[1.0].mean),
        "c80": _found(c80, 80.0),
        "cp": _found(cp, prompted_coherence),
        "curve": [asdict(point) for point in cp.curve],
        "by_question": {place: scorer.seen[alpha].by_question() for place, alpha in at.items() if alpha is not None},
        "unscored": scorer.unscored(),
        "prompt_recovery": recovery,
        "relative_rmse": {str(layer): value for layer, value in rmse.items()},
        "example": example,
        "train_seconds": fitted.seconds,
        "adapter_bytes": fitted.bytes,
        "dead_gates": fitted.dead_gates,
        "notes": fitted.notes,
        "samples": scorer.samples(1.0 if cp.alpha is None else cp.alpha),
    }


def _example(model: PeftModel, processing_class, triplet: Triplet) -> dict[str, Any]:
    """What prompt and adapter move at strength 1 in one held-out completion, and a PSR adapter's gates, by layer."""
    tokens, prompt, adapter = intervention_strength(model, triplet, processing_class)
    gates = {}
    if not has_lora(model):
        with at_strength(model, 1.0):
            gates = map_tokens(model, processing_class, model.active_adapter, triplet).gates
    row = TripletCollator(processing_class, alpha=1.0).encode(triplet)
    first = (
        len(tokens) - (len(row["input_ids"]) - row["prompt_length"]) - 1
    )  # the last prompt token; under some positions the question is edited too

    def shown(values: torch.Tensor) -> list[Any]:
        return values[..., first : first + SHOWN].double().round(decimals=5).tolist()

    return {
        "tokens": tokens[first : first + SHOWN],
        "prompt": shown(prompt),
        "adapter": shown(adapter),
        "gates": {str(layer): shown(values) for layer, values in gates.items()},
    }


def _found(calibration: Calibration, target: float) -> dict[str, Any]:
    return {"target": target} | {name: getattr(calibration, name) for name in ("alpha", "trait", "coherence", "why")}
