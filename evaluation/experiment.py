"""One trait, all methods: makes the triplets, trains each adapter, measures it on what was held out.

Training sees the training instructions, topics and question forms; every score is on held-out ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from peft_psr.evaluation.measures.calibration import Calibration, calibrate_alpha
from peft_psr.evaluation.measures.faithfulness import prompt_recovery, relative_rmse
from peft_psr.evaluation.measures.scoring import SteeringScore, score_model
from peft_psr.evaluation.methods.method import FitSettings, Method
from peft_psr.prompts.messages import Message
from peft_psr.training import Triplet, add_instruction, filter_triplets, generate_triplets
from peft_psr.training.judges.base import Judging


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the demo's normal and quick settings.

    Attributes:
        train_prompts: Prompts drawn from the training split, for each instruction.
        train_draws: Completions for each of them.
        held_out_draws: Completions for each pair of held-out instruction and question, to measure faithfulness on.
        score_draws: Answers for each held-out question and strength.
        epochs: Passes over the triplets: for MSE and KL, and for likelihood and preference.
        batch_size: Triplets a training step.
        curve: Strengths measured for every method.
        calibration_steps: Further strengths tried for each target.
    """

    train_prompts: int = 20
    train_draws: int = 2
    held_out_draws: int = 2
    score_draws: int = 8
    epochs: tuple[float, float] = (15.0, 7.0)
    batch_size: int = 8
    curve: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    calibration_steps: int = 8


@dataclass
class SteeringTask:
    """A trait to steer towards, with its data and judge.

    Attributes:
        name: The trait.
        judge: Scores answers for it.
        train_instructions: System texts that elicit the trait.
        test_instructions: Others, held out.
        train_prompts: Bare conversations.
        test_prompts: Others, held out.
        max_new_tokens: Longest answer.
    """

    name: str
    judge: Judging
    train_instructions: list[str]
    test_instructions: list[str]
    train_prompts: list[list[Message]]
    test_prompts: list[list[Message]]
    max_new_tokens: int


@dataclass
class Outcome:
    """What one method came to; see `as_row` for the meaning of each number."""

    method: str
    curve: list[SteeringScore]
    alpha1: SteeringScore
    c80: Calibration | None = None
    cp: Calibration | None = None
    recovery: float | None = None
    rmse: dict[int | str, float] = field(default_factory=dict)
    train_seconds: float | None = None
    adapter_bytes: int | None = None
    dead_gates: list[str] = field(default_factory=list)


class Experiment:
    """Runs methods on one task and keeps what they share: triplets, held-out triplets, reference scores.

    Args:
        model: The base model; left as it was.
        processing_class: Its tokenizer.
        task: What to steer towards.
        sizes: How much of everything.
        seed: Same seed, same machine: same numbers.
        layer: The layer that single-layer methods edit; `None` for the one just before the middle.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class,
        task: SteeringTask,
        sizes: Sizes,
        seed: int = 0,
        layer: int | None = None,
    ) -> None:
        self.model, self.processing_class, self.task = model, processing_class, task
        self.sizes, self.seed = sizes, seed
        self.layer = (model.config.num_hidden_layers - 1) // 2 if layer is None else layer
        self.triplets: list[Triplet] = []
        self.held_out: list[Triplet] = []

    def prepare(self) -> tuple[Outcome, Outcome]:
        """Make both sets of triplets, and score the model plain and prompted."""
        task, sizes = self.task, self.sizes
        rng = random.Random(self.seed)
        prompts = rng.sample(task.train_prompts, min(sizes.train_prompts, len(task.train_prompts)))
        drawn = self._generate(task.train_instructions, prompts, sizes.train_draws, self.seed)
        self.triplets = filter_triplets(drawn)
        self.held_out = [
            triplet
            for triplet in self._generate(
                task.test_instructions, task.test_prompts, sizes.held_out_draws, self.seed + 1
            )
            if triplet["completion"]
        ]
        plain = self._score(self.model, task.test_prompts)
        pairs = [(add_instruction(p, i), p) for i in task.test_instructions for p in task.test_prompts]
        prompted = self._score(self.model, [steered for steered, _ in pairs], bare=[bare for _, bare in pairs])
        self.prompted = prompted[0]
        return Outcome("none", plain, plain[0]), Outcome("prompt", prompted, prompted[0])

    def _generate(self, instructions: list[str], prompts: list, draws: int, seed: int) -> list[Triplet]:
        return generate_triplets(
            self.model,
            self.processing_class,
            instructions,
            prompts,
            self.task.judge,
            num_draws=draws,
            max_new_tokens=self.task.max_new_tokens,
            batch_size=256,
            seed=seed,
            progress=False,
        )

    def _score(self, model, prompts: list, alphas: list[float] | None = None, bare: list | None = None):
        return score_model(
            model,
            self.processing_class,
            prompts,
            self.task.judge,
            max_new_tokens=self.task.max_new_tokens,
            alphas=alphas,
            bare_prompts=bare,
            num_draws=self.sizes.score_draws,
            seed=self.seed + 2,
        )

    def train(self, method: Method, on_step: Callable[[int, int], None] | None = None) -> tuple[PeftModel, Outcome]:
        """Train one method's adapter; `on_step` is called with steps done and steps in all."""
        begin = time.perf_counter()
        settings = FitSettings(
            layer=self.layer,
            seed=self.seed,
            epochs=self.sizes.epochs,
            batch_size=self.sizes.batch_size,
            on_step=on_step,
        )
        fitted = method.fit(self.model, self.processing_class, self.triplets, settings)
        seconds = time.perf_counter() - begin
        outcome = Outcome(method.name, [], self.prompted, train_seconds=seconds, dead_gates=fitted.dead_gates)
        return fitted.model, outcome

    def measure(self, model: PeftModel, outcome: Outcome) -> Outcome:
        """Scores along the curve, both calibrations, faithfulness, size."""
        prompts = self.task.test_prompts
        outcome.curve = self._score(model, prompts, list(self.sizes.curve))
        outcome.alpha1 = next(point for point in outcome.curve if point.alpha == 1.0)

        def score(alpha: float) -> SteeringScore:
            return self._score(model, prompts, [alpha])[0]

        steps = self.sizes.calibration_steps
        outcome.c80 = calibrate_alpha(score, 80.0, max_steps=steps, curve=outcome.curve)
        outcome.cp = calibrate_alpha(score, self.prompted.coherence, max_steps=steps, curve=outcome.c80.curve)
        outcome.curve = outcome.cp.curve
        outcome.recovery = prompt_recovery(model, self.held_out, self.processing_class)
        outcome.rmse = relative_rmse(model, self.held_out, self.processing_class)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            outcome.adapter_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
        return outcome


def as_row(outcome: Outcome) -> dict[str, Any]:
    """An outcome for `results.json`; a value that could not be had is null and `why` says why."""
    why: dict[str, str] = {}

    def value(name: str, number: float | None, reason: str | None) -> float | None:
        if reason is not None:
            why[name] = reason
        return None if number is None else round(number, 4)

    def calibrated(name: str, calibration: Calibration | None) -> tuple[float | None, float | None]:
        if calibration is None:
            reason = "no adapter, so no strength to choose"
            return value(f"ta_{name}", None, reason), value(f"alpha_{name}", None, reason)
        return (
            value(f"ta_{name}", calibration.trait, calibration.why),
            value(f"alpha_{name}", calibration.alpha, calibration.why),
        )

    no_adapter = "no adapter" if outcome.c80 is None else None
    ta_c80, alpha_c80 = calibrated("c80", outcome.c80)
    ta_cp, alpha_cp = calibrated("cp", outcome.cp)
    row = {
        "method": outcome.method,
        "alpha1": {"trait": round(outcome.alpha1.trait, 4), "coherence": round(outcome.alpha1.coherence, 4)},
        "ta_c80": ta_c80,
        "ta_cp": ta_cp,
        "alpha_c80": alpha_c80,
        "alpha_cp": alpha_cp,
        "prompt_recovery": value("prompt_recovery", outcome.recovery, no_adapter),
        "train_seconds": value("train_seconds", outcome.train_seconds, no_adapter),
        "adapter_bytes": value("adapter_bytes", outcome.adapter_bytes, no_adapter),
        "relative_rmse": {str(layer): round(rmse, 4) for layer, rmse in outcome.rmse.items()},
        "dead_gates": outcome.dead_gates,
        "curve": [[point.alpha, round(point.trait, 3), round(point.coherence, 3)] for point in outcome.curve],
    }
    return {**row, "why": why} if why else row
