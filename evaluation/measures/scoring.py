"""Trait and coherence scores, 0-100, of what a model answers: plain, prompted, or steered at several strengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.hub.facts import Score
from peft_psr.prompts.conversations import Prompt
from peft_psr.prompts.messages import Message
from peft_psr.training.judges.base import JudgeScores, Judging, check_answered, judge_answers

from .strength import sample_steered


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

    def for_card(self) -> Score:
        """As an adapter's facts and its model card have it."""
        return Score(self.trait, self.coherence, self.alpha)


@dataclass(frozen=True)
class Answers:
    """What a model answered at one strength.

    Attributes:
        alpha: The strength, or `None` without an adapter.
        questions: For each answer, which of the questions it is to, from 0.
        texts: The answers.
        scores: The judge's.
    """

    alpha: float | None
    questions: list[int]
    texts: list[str]
    scores: list[JudgeScores]

    @property
    def mean(self) -> SteeringScore:
        """Means over the answers that have both scores; `ValueError` if none has."""
        both = [(s.trait, s.coherence) for s in self.scores if s.trait is not None and s.coherence is not None]
        if not both:
            raise ValueError(f"The judge scored none of {len(self.scores)} completions.")
        trait, coherence = (sum(column) / len(both) for column in zip(*both, strict=True))
        return SteeringScore(self.alpha, trait, coherence, len(both))

    def by_question(self) -> list[list[list[float]]]:
        """For each question the [trait, coherence] of its answers that have both scores, 0-100."""
        grouped: list[list[list[float]]] = [[] for _ in range(max(self.questions) + 1)]
        for question, score in zip(self.questions, self.scores, strict=True):
            if score.trait is not None and score.coherence is not None:
                grouped[question].append([round(score.trait, 3), round(score.coherence, 3)])
        return grouped


def judged_answers(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    bare_prompts: Sequence[Prompt],
    questions: Sequence[int],
    judge: Judging,
    sampling: Mapping[str, Any],
    alphas: Sequence[float] | None = None,
) -> list[Answers]:
    """Sample an answer to every prompt at every strength, and have them judged.

    `prompts` are repeated for several draws; the judge is shown `bare_prompts`; `questions` are which question each
    asks, from 0; `sampling` is as `sample_completions` takes it. Other arguments as `score_model`.

    Returns:
        For each strength the answers in the order of the prompts; one in all without `alphas`.

    Raises:
        ConnectionError: the judge failed on an answer.
    """
    strengths: list[float | None] = [None] if alphas is None else list(alphas)
    completions = sample_steered(
        model,
        processing_class,
        [prompt for _ in strengths for prompt in prompts],
        None if alphas is None else [alpha for alpha in alphas for _ in prompts],
        **sampling,
    )
    texts = [completion.text for completion in completions]
    scores = judge_answers(
        judge,
        [prompt for _ in strengths for prompt in bare_prompts],
        [completion.answer for completion in completions],
    )
    check_answered([score.failure for score in scores])
    size = len(prompts)
    return [
        Answers(alpha, list(questions), texts[k * size : (k + 1) * size], scores[k * size : (k + 1) * size])
        for k, alpha in enumerate(strengths)
    ]


def score_model(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    judge: Judging,
    max_new_tokens: int,
    alphas: Sequence[float] | None = None,
    bare_prompts: Sequence[Sequence[Message]] | None = None,
    num_draws: int = 1,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: str | None = None,
) -> list[SteeringScore]:
    """Sample answers and have them judged; rows of all strengths of a PSR adapter are sampled together.

    Args:
        model: A causal language model.
        processing_class: Its tokenizer.
        prompts: What the model is given.
        judge: Scores the answers.
        max_new_tokens: Longest answer, in tokens.
        alphas: Strengths of the PSR or LoRA adapter; `None` for a model without one.
        bare_prompts: What the judge is shown; `None` if that is the same as `prompts`.
        num_draws: Answers for each prompt and strength.
        temperature: Of the sampling.
        batch_size: Answers sampled together.
        seed: Of the sampling.
        progress: Title of a progress bar, or `None`.

    Returns:
        One score for each strength, in order; one in all without `alphas`.

    Raises:
        ConnectionError: the judge failed on an answer.
        ValueError: no prompts, or the judge scored none of the answers.
    """
    if not prompts:
        raise ValueError("score_model needs at least one prompt.")
    rows = [i for i in range(len(prompts)) for _ in range(num_draws)]
    shown = prompts if bare_prompts is None else bare_prompts
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
    }
    answers = judged_answers(
        model, processing_class, [prompts[i] for i in rows], [shown[i] for i in rows], rows, judge, sampling, alphas
    )
    return [one.mean for one in answers]
