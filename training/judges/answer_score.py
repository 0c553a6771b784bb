"""A judge's answer as a score: from the log-probabilities of its first token, else from its text.

    score = sum_n p(n) n / sum_n p(n)

over the integers n of 0-100 among the 20 likeliest first tokens; none if they hold less than 0.25 of the mass
(METHOD 6).

What follows a number decides whether it is one: "8" opens 8/10, "1" a list, "7" 7.5. So where the judge's own answer
opens with a number, that answer is read as text too (`score_text`): no score if it is none.

Tokenizers that write 85 as "8" "5" (Qwen, Gemma, Llama 2) break this: their first token is a digit, and the mean of
digits is no score. A server tells too little to repair that, since it shows one continuation only, so the number in
the text is taken. A local model can be asked for every number: see `number_scores`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Literal, NamedTuple

from peft_psr.prompts.reasoning import split_reasoning

from .score_text import score_text


if TYPE_CHECKING:
    from peft_psr.training.sampling.server_replies import ServerAnswer, TopTokens


TOP_TOKENS = 20
"""How many of the likeliest tokens enter, by METHOD 6; servers that give fewer are asked for what they give."""
MIN_MASS = 0.25

_INTEGER = re.compile(r"[▁Ġ\s]*(0|[1-9][0-9]?|100)\s*")


class Scored(NamedTuple):
    """A score 0-100, or `None` where the judge could not tell, and what it was read from."""

    score: float | None
    source: Literal["log-probabilities", "text"]


def weighted_mean(masses: dict[int, float]) -> float | None:
    """The mean of the numbers by their probabilities; `None` if these sum to less than `MIN_MASS`."""
    total = sum(masses.values())
    return sum(number * mass for number, mass in masses.items()) / total if total >= MIN_MASS else None


def number_masses(top: TopTokens) -> dict[int, float]:
    """The probability of each integer 0-100 among the tokens, blanks around it ignored."""
    masses: dict[int, float] = {}
    for token, logprob in top:
        if match := _INTEGER.fullmatch(token):
            number = int(match[1])
            masses[number] = masses.get(number, 0.0) + math.exp(logprob)
    return masses


def score_answer(answer: ServerAnswer) -> Scored:
    """The score in a server's answer, from log-probabilities if there are any and its numbers are single tokens.

    Where reasoning comes first, the score is what the text after it says, and none if it did not end.
    """
    places = answer.tokens or []
    if split_reasoning(answer.text).reasoning is not None:
        places = []
    # some tokenizers open an answer with a blank token, some models with bold face
    while places and not places[0][0].strip("▁Ġ \n*"):
        places = places[1:]
    if places:
        masses = number_masses(places[0][1])
        score = weighted_mean(masses)
        if score is None:
            return Scored(None, "log-probabilities")
        own = _INTEGER.fullmatch(places[0][0])
        said = score_text(answer.text) if own else None
        if own and said is None:
            return Scored(None, "log-probabilities")
        if _whole_numbers(places, masses) and (own is None or said == int(own[1])):
            return Scored(score, "log-probabilities")
    return Scored(score_text(answer.text, answer.finish_reason == "length"), "text")


def _whole_numbers(places: list[tuple[str, TopTokens]], masses: dict[int, float]) -> bool:
    # A number of two digits among the candidates shows that the tokenizer has such tokens; without one nobody can
    # tell "7" from the first digit of 75. Digits in the token after a number show that numbers are split.
    split = _INTEGER.fullmatch(places[0][0]) and len(places) > 1 and places[1][0][:1].isdigit()
    return not split and max(masses) >= 10
