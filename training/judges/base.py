"""What a judge is: anything that scores completions for a trait and for coherence, both 0-100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from peft_psr.prompts.messages import Message


class JudgeScores(NamedTuple):
    """The two scores of one completion, each 0-100, or `None` where the judge could not tell.

    Attributes:
        trait: How strongly the completion shows the trait.
        coherence: How coherent it is as an answer to the prompt.
        failure: Why the judge gave no answer at all, e.g. a server that failed after all retries; both scores are
            `None` then, and judging the completion again may help. `None` where the judge answered.
    """

    trait: float | None
    coherence: float | None
    failure: str | None = None


class Judge(Protocol):
    """Scores completions in batches.

    A judge is shown the *bare* prompt x (without the instruction that elicits the trait), so that the prompted and the
    steered model are judged alike. A judge may have `describe() -> dict`, which says as JSON what it is and how it
    scores, for the manifest of a run.
    """

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[JudgeScores]:
        """Score `completions[i]` as an answer to `prompts[i]`; one `JudgeScores` per completion, in order."""
        ...


def judge_answers(judge: Judge, prompts: Sequence[Any], answers: Sequence[str | None]) -> list[JudgeScores]:
    """A judge's scores of answers; it is not asked about those that are not there, which get none.

    Args:
        judge: Who scores.
        prompts: What each is an answer to.
        answers: `None` where a model did not come to answer: its reasoning was cut off.
    """
    there = [i for i, answer in enumerate(answers) if answer is not None]
    scores = [JudgeScores(None, None)] * len(answers)
    if there:
        found = judge([prompts[i] for i in there], [answers[i] for i in there])  # type: ignore[misc]
        for i, score in zip(there, found, strict=True):
            scores[i] = score
    return scores
