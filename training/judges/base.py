"""What a judge is: one object that scores completions for a trait and for coherence, both 0-100.

To add one: a subclass of `Judge` in a file of its own, and its name in `registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from peft_psr.prompts.conversations import Prompt
from peft_psr.training.data.draws import PromptPair

from .settings import JudgeSettings


class JudgeScores(NamedTuple):
    """The two scores of one completion, each 0-100, or `None` where the judge could not tell."""

    trait: float | None  # how strongly the completion shows the trait
    coherence: float | None  # how coherent it is as an answer to the prompt
    # why the judge gave no answer at all, e.g. a server that failed after all retries; both scores are `None` then,
    # and judging the completion again may help. `None` where the judge answered
    failure: str | None = None


Judging = Callable[[Sequence[Prompt], Sequence[str]], list[JudgeScores]]
"""A judge as a plain function of prompts and completions; every `Judge` is one too."""


class Judge(ABC):
    """Scores completions in batches. What is said here holds for most; a subclass says what is otherwise.

    A judge is shown the *bare* prompt x (without the instruction that elicits the trait), so that the prompted and the
    steered model are judged alike.

    Attributes:
        needs_model: It asks a language model, which the recipe must name as `judge_model`.
        at_server: That model is on a server.
        scores_coherence: Where not, a recipe may name a `coherence_judge` beside it.
    """

    needs_model: ClassVar[bool] = False
    at_server: ClassVar[bool] = False
    scores_coherence: ClassVar[bool] = True

    @classmethod
    def maker(cls, given: JudgeSettings) -> Callable[[str], Judge]:
        """Returns what makes each trait's judge; what can be known to be wrong shows here, before anything is drawn.

        Raises:
            ValueError: it can't be made of what is given, or can't score those prompts.
        """
        return lambda trait: cls()

    @abstractmethod
    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], pairs: Sequence[PromptPair] | None = None
    ) -> list[JudgeScores]:
        """Score `completions[i]` as an answer to the bare `prompts[i]`; one `JudgeScores` per completion, in order.

        Args:
            prompts: Bare prompts.
            completions: As many.
            pairs: What each was drawn for, where that is known: for a judge that must know the instruction.
        """

    def describe(self) -> dict[str, Any]:
        """What it is and how it scores, as JSON, for the manifest of a run."""
        return {"judge": type(self).__name__}

    @cached_property
    def usage(self) -> Counter[str]:
        """What was spent so far, where that is counted: `calls`, `cached`, `prompt_tokens`, `completion_tokens`."""
        return Counter()

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[JudgeScores]:
        """`score`, as a plain function; raises `ValueError` if there are not as many completions as prompts."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one for each.")
        return self.score(prompts, completions)


class _FunctionJudge(Judge):
    """A plain function as a judge."""

    def __init__(self, function: Judging) -> None:
        self.function = function

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], pairs: Sequence[PromptPair] | None = None
    ) -> list[JudgeScores]:
        return self.function(prompts, completions)

    def describe(self) -> dict[str, Any]:
        return {"judge": type(self.function).__name__}


def as_judge(judge: Judging) -> Judge:
    """A `Judge` as it is; a plain function as one."""
    return judge if isinstance(judge, Judge) else _FunctionJudge(judge)


def judge_answers(
    judge: Judging, prompts: Sequence[Prompt], answers: Sequence[str | None], pairs: Sequence[PromptPair] | None = None
) -> list[JudgeScores]:
    """A judge's scores of answers to prompts; it is not asked about those that are `None`, which get none.

    An answer is `None` where the model's reasoning was cut off before it; `pairs` are as in `Judge.score`.
    """
    there = {i: answer for i, answer in enumerate(answers) if answer is not None}
    scores = [JudgeScores(None, None)] * len(answers)
    if there:
        asked = None if pairs is None else [pairs[i] for i in there]
        found = as_judge(judge).score([prompts[i] for i in there], list(there.values()), asked)
        for i, score in zip(there, found, strict=True):
            scores[i] = score
    return scores


def check_answered(failures: Sequence[str | None]) -> None:
    """Raise `ConnectionError` if `failures` hold a reason why a question has no answer; the others' are kept."""
    failed = [reason for reason in failures if reason is not None]
    if failed:
        raise ConnectionError(
            f"The judge failed on {len(failed)} of {len(failures)} questions ({failed[0]}). What it has said is kept; "
            "the same command asks again."
        )
