"""IFEval's prompts parted into folds, its scored answers, and the accuracy they come to.

Accuracy is on the level of prompts, as Zhou et al. (arXiv 2311.07911) define it: the share of prompts all of whose
instructions are followed, strictly or loosely. Intervals are over bare prompts: several prompts of a keyword type may
be one bare prompt with another word asked for.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft_psr.evaluation.benchmarks.cell import grouped
from peft_psr.evaluation.reports.intervals import value_of
from peft_psr.evaluation.reports.report import Value
from peft_psr.prompts.conversations import Prompt, turn_texts
from peft_psr.training import PromptPair, Triplet


_FAMILIES = {"keywords:": "keywords", "length_constraints:": "length"}


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer and what was said of it.

    Attributes:
        model: The base model.
        trait: The instruction's type.
        pair: The prompt pair's id.
        question: The bare prompt as text.
        condition: The row of the tables it counts in.
        seed: Of adapter and sampling; `None` for a model without an adapter that takes the likeliest token.
        fold: The fold its prompt is in; empty where there are none.
        alpha: Strength of the adapter; `None` without one.
        answer: What the model said.
        truncated: Whether it was cut off at the token limit.
        strict: Whether all instructions are followed.
        loose: The same in one of the published looser forms.
        coherence: 0-100, or `None`.
    """

    model: str
    trait: str
    pair: str
    question: str
    condition: str
    seed: int | None
    fold: str
    alpha: float | None
    answer: str
    truncated: bool
    strict: bool
    loose: bool
    coherence: float | None


def family(trait: str) -> str:
    """The family of an instruction type: "keywords", "length", or "format" for all others; several joined by " + "."""
    found = {
        next((name for start, name in _FAMILIES.items() if instruction.startswith(start)), "format")
        for instruction in trait.split(" + ")
    }
    return " + ".join(sorted(found))


def bare_text(prompt: Prompt) -> str:
    """What the user says in a prompt: what two prompts have in common that are the same question."""
    return "\n\n".join(turn_texts(prompt, "user")).strip()


def split_folds(pairs: Sequence[PromptPair], folds: int, seed: int) -> list[list[PromptPair]]:
    """Parts a type's prompts into folds of about equal size, each in their order; equal bare prompts are in one fold.

    They are dealt in an order by `seed`. `ValueError` if there are fewer different bare prompts than folds.
    """
    questions = Counter(bare_text(pair.prompt) for pair in pairs)
    if len(questions) < folds:
        raise ValueError(f"{len(questions)} different bare prompts can't be parted into {folds} folds.")
    order = sorted(questions)
    random.Random(seed).shuffle(order)
    sizes, fold_of = [0] * folds, {}
    for question in order:
        smallest = sizes.index(min(sizes))
        fold_of[question] = smallest
        sizes[smallest] += questions[question]
    return [[pair for pair in pairs if fold_of[bare_text(pair.prompt)] == fold] for fold in range(folds)]


def rows_apart(triplets: Iterable[Triplet], tested: Iterable[PromptPair]) -> list[Triplet]:
    """The triplets whose bare prompt is none of those that the adapter is to be tested on."""
    questions = {bare_text(pair.prompt) for pair in tested}
    return [triplet for triplet in triplets if bare_text(triplet["prompt"]) not in questions]


def by_condition(answers: Iterable[ScoredAnswer]) -> dict[str, list[ScoredAnswer]]:
    """{condition: its answers}, in order."""
    return grouped((answer.condition, [answer]) for answer in answers)


def accuracy(answers: Iterable[ScoredAnswer], measure: str) -> Value:
    """Share of answers, 0-100, for which `measure` ("strict", "loose" or "truncated") holds."""
    return value_of(_by_question(answers, measure), scale=100.0)


def coherence(answers: Sequence[ScoredAnswer], why: str | None) -> Value:
    """Mean coherence, 0-100, of a condition's answers that have a score; `why` none has, if no judge was asked."""
    scored = [answer for answer in answers if answer.coherence is not None]
    if not why and len(scored) < len(answers):
        why = f"{len(answers) - len(scored)} of {len(answers)} answers have no score"
    return value_of(_by_question(scored, "coherence"), why=why)


def _by_question(answers: Iterable[ScoredAnswer], measure: str) -> Mapping[str, list[float]]:
    return grouped((answer.question, [float(getattr(answer, measure))]) for answer in answers)
