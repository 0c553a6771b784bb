"""A judge's answer as a score: from the log-probabilities of its first token, else from its text.

    score = sum_n p(n) n / sum_n p(n)

over the integers n of 0-100 among the 20 likeliest first tokens; none if they hold less than 0.25 of the mass
(METHOD 6).

Tokenizers that write 85 as "8" "5" (Qwen, Gemma, Llama 2) break this: their first token is a digit, and the mean of
digits is no score. A server tells too little to repair that, since it shows one continuation only, so the number in
the text is taken. A local model can be asked for every number: see `local_judge`.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from .server_replies import Answer, TopTokens


TOP_TOKENS = 20
"""How many of the likeliest tokens enter, by METHOD 6 and by the limit of most servers."""
MIN_MASS = 0.25

_INTEGER = re.compile(r"[▁Ġ\s]*(0|[1-9][0-9]?|100)\s*")
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")


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


def score_answer(answer: Answer) -> Scored:
    """The score in a server's answer, from log-probabilities if there are any and its numbers are single tokens."""
    places = answer.tokens or []
    # some tokenizers open an answer with a blank token
    while places and not places[0][0].strip("▁Ġ \n"):
        places = places[1:]
    if places:
        masses = number_masses(places[0][1])
        score = weighted_mean(masses)
        if score is None or _whole_numbers(places, masses):
            return Scored(score, "log-probabilities")
    return Scored(score_text(answer.text, answer.finish_reason == "length"), "text")


def _whole_numbers(places: list[tuple[str, TopTokens]], masses: dict[int, float]) -> bool:
    # A number of two digits among the candidates shows that the tokenizer has such tokens; without one nobody can
    # tell "7" from the first digit of 75. Digits in the token after a number show that numbers are split.
    split = _INTEGER.fullmatch(places[0][0]) and len(places) > 1 and places[1][0][:1].isdigit()
    return not split and max(masses) >= 10


def score_text(text: str, cut_off: bool = False) -> float | None:
    """The number 0-100 that the text opens with, or else the only one in it; `None` if there is no such number.

    Args:
        text: A judge's answer.
        cut_off: The text ended at a token limit, so that a number at its end may lack digits.
    """
    text = text.strip()
    numbers = list(_NUMBER.finditer(text))
    if not numbers or (numbers[0].start() > 0 and len(numbers) > 1):
        return None
    if cut_off and numbers[0].end() == len(text):
        return None
    score = float(numbers[0][0])
    return score if 0 <= score <= 100 else None
