"""Trait and coherence scores, 0-100, of what a model answers: plain, prompted, or steered at several strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_psr.judging import Judge, Message
from peft_psr.training.sampling import sample_completions


@dataclass(frozen=True)
class SteeringScore:
    """Mean scores of a batch of completions.

    Attributes:
        alpha: Strength of the adapter, or `None` where there is none.
        trait: Mean trait score, 0-100.
        coherence: Mean coherence score, 0-100.
        completions: How many completions the means are over: those with both scores.
    """

    alpha: float | None
    trait: float
    coherence: float
    completions: int


def score_model(
    model,
    processing_class,
    prompts: Sequence[Sequence[Message]],
    judge: Judge,
    max_new_tokens: int,
    alphas: Sequence[float] | None = None,
    bare_prompts: Sequence[Sequence[Message]] | None = None,
    num_draws: int = 1,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: str | None = None,
) -> list[SteeringScore]:
    """Sample answers and have them judged; rows of all strengths are sampled together.

    Args:
        model: A causal language model.
        processing_class: Its tokenizer.
        prompts: What the model is given.
        judge: Scores the answers.
        max_new_tokens: Longest answer, in tokens.
        alphas: Strengths of the PSR adapter; `None` for a model without one.
        bare_prompts: What the judge is shown; `None` if that is the same as `prompts`.
        num_draws: Answers for each prompt and strength.
        temperature: Of the sampling.
        batch_size: Answers sampled together.
        seed: Of the sampling.
        progress: Title of a progress bar, or `None`.

    Returns:
        One score for each strength, in order; one in all without `alphas`.

    Raises:
        ValueError: no prompts, or the judge scored none of the answers.
    """
    if not prompts:
        raise ValueError("score_model needs at least one prompt.")
    rows = [i for i in range(len(prompts)) for _ in range(num_draws)]
    strengths: list[float | None] = [None] if alphas is None else list(alphas)
    shown = prompts if bare_prompts is None else bare_prompts
    completions = sample_completions(
        model,
        processing_class,
        [prompts[i] for _ in strengths for i in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        alpha=None if alphas is None else [alpha for alpha in alphas for _ in rows],
        progress=progress,
    )
    scores = judge([shown[i] for _ in strengths for i in rows], [completion.text for completion in completions])
    return [mean_score(alpha, scores[k * len(rows) : (k + 1) * len(rows)]) for k, alpha in enumerate(strengths)]


def mean_score(alpha: float | None, scores: Sequence[Any]) -> SteeringScore:
    """Means over the completions that have both scores.

    Raises:
        ValueError: none has.
    """
    both = [(s.trait, s.coherence) for s in scores if s.trait is not None and s.coherence is not None]
    if not both:
        raise ValueError(f"The judge scored none of {len(scores)} completions.")
    trait, coherence = (sum(column) / len(both) for column in zip(*both, strict=True))
    return SteeringScore(alpha, trait, coherence, len(both))
