"""`psr evaluate persona`: trait and coherence on held-out questions, at alpha 1 and where coherence is a target.

    TA@C80    mean trait score at the largest strength whose mean coherence is 80
    TA@Cp     the same where coherence is the prompted model's

Scores are the judge's, 0-100. Strengths are found by bisection on the same answers that are then reported, as METHOD's
protocol has it. Sources: Persona Vectors (arXiv 2507.21509) for traits and questions; arXiv 2605.03907 for the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.benchmarks.cell import Cell, Result
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.measures.calibration import Calibration, calibrate_alpha
from peft_psr.evaluation.measures.faithfulness import edited_gates, intervention_strength, recovery_and_rmse
from peft_psr.evaluation.measures.scoring import Answers, SteeringScore, judged_answers
from peft_psr.evaluation.methods.method import PROMPT
from peft_psr.evaluation.reports.report import Report
from peft_psr.training import Triplet, TripletCollator
from peft_psr.training.runs.triplets.run import NothingKeptError
from peft_psr.training.sources.registry import check_test_split

from .recipe import PersonaRecipe
from .report import persona_report


MAX_ALPHA = 64.0
"""Largest strength searched: some methods count theirs in standard deviations."""
SHOWN = 48
"""Tokens, from the last one of the prompt on, of the completion that is shown token by token."""
SAMPLED = 2
"""Questions of each trait whose first answer is kept to be read."""


def check_persona(bench: Workbench[PersonaRecipe]) -> None:
    """Raises what `Workbench.check` does, before any long work; and `ValueError` without held-out questions."""
    check_test_split(bench.recipe.source)
    bench.check()


def run_persona(bench: Workbench[PersonaRecipe]) -> Report:
    """Measures the matrix; a trait of which no triplet was kept is left out, and the report says so.

    `ConnectionError` if the judge failed on answers after every retry, `ValueError` if it scored nothing, or no trait
    is left.
    """
    cells, left_out = persona_cells(bench)
    return persona_report(bench.recipe, cells, left_out)


def persona_cells(bench: Workbench[PersonaRecipe]) -> tuple[list[Cell], list[str]]:
    """What `run_persona` measures, without a report: the cells, and what was left out and why."""
    bench.expect(len(bench.matrix()))
    left_out: list[str] = []
    cells = bench.cells(_with_triplets(bench, left_out), partial(_measure, bench))
    if not cells:
        raise ValueError(" ".join(left_out))
    return cells, left_out


def _with_triplets(bench: Workbench[PersonaRecipe], left_out: list[str]) -> Iterator[Cell]:
    """The matrix without traits that nothing was kept of to train on, with the reason for each in `left_out`."""
    for (model, trait), cells in groupby(bench.matrix(), lambda cell: (cell.model, cell.trait)):
        try:
            if bench.recipe.methods:
                bench.triplets(model, trait)
        except NothingKeptError as error:
            left_out.append(f"{trait} of {model} is left out: {error}")
            continue
        yield from cells


def _measure(bench: Workbench[PersonaRecipe], cell: Cell) -> Result:
    if not cell.has_adapter:
        return _reference(bench, cell)
    prompted = bench.kept(replace(cell, method=PROMPT))
    return _adapter(bench, cell, prompted["alpha1"]["coherence"])


class _Scorer:
    """Answers of a model to a trait's held-out questions, kept by strength."""

    def __init__(self, bench: Workbench[PersonaRecipe], cell: Cell) -> None:
        pairs, recipe = bench.pairs("test")[cell.trait], bench.recipe
        bare: list[Any] = []
        for pair in pairs:
            if pair.prompt not in bare:
                bare.append(pair.prompt)
        asked = [(prompt, prompt) for prompt in bare]
        if cell.method == PROMPT:
            asked = [(pair.steered_prompt, pair.prompt) for pair in pairs]
        rows = [row for row in asked for _ in range(recipe.score_draws)]
        self.prompts, self.bare = [row[0] for row in rows], [row[1] for row in rows]
        self.questions = [bare.index(prompt) for prompt in self.bare]
        self.judge = bench.judge(cell.trait)
        self.sampling = recipe.sampling(cell.seed)
        self.seen: dict[float | None, Answers] = {}

    def measure(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        alphas: Sequence[float] | None,
    ) -> list[SteeringScore]:
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
                }
            )
        return kept


def _reference(bench: Workbench[PersonaRecipe], cell: Cell) -> Result:
    """The plain or the prompted model."""
    scorer = _Scorer(bench, cell)
    (score,) = scorer.measure(*bench.load(cell.model), None)
    return {
        "alpha1": asdict(score),
        "by_question": {"alpha1": scorer.seen[None].by_question()},
        "unscored": scorer.unscored(),
        "samples": scorer.samples(None),
    }


def _adapter(bench: Workbench[PersonaRecipe], cell: Cell, prompted_coherence: float) -> Result:
    recipe = bench.recipe
    _, processing_class = bench.load(cell.model)
    with bench.fitted(cell) as fitted:
        scorer = _Scorer(bench, cell)
        curve = scorer.measure(fitted.model, processing_class, recipe.strengths)

        def score(alpha: float) -> SteeringScore:
            return scorer.measure(fitted.model, processing_class, [alpha])[0]

        search = partial(calibrate_alpha, score, max_steps=recipe.calibration_steps, max_alpha=MAX_ALPHA)
        c80 = search(80.0, curve=curve)
        cp = search(prompted_coherence, curve=c80.curve)
        held_out = bench.held_out(cell.model, cell.trait)
        recovery, rmse = recovery_and_rmse(fitted.model, held_out, processing_class)
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


def _example(model: PeftModel, processing_class: PreTrainedTokenizerBase, triplet: Triplet) -> dict[str, Any]:
    """What prompt and adapter move at strength 1 in one held-out completion, and a PSR adapter's gates, by layer."""
    tokens, prompt, adapter = intervention_strength(model, triplet, processing_class)
    gates = edited_gates(model, triplet, processing_class)
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
