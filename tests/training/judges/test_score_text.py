"""A judge's answer as a score: by the likeliest first tokens, and by what the text says and what it can't mean."""

from __future__ import annotations

import math

import pytest

from peft_psr.training.judges.answer_score import number_masses, score_answer, weighted_mean
from peft_psr.training.judges.score_text import score_text
from peft_psr.training.sampling.server_replies import ServerAnswer


def spread(*pairs):
    return [(token, math.log(p)) for token, p in pairs]


def answer(text, *places, finish_reason="stop"):
    return ServerAnswer(text, finish_reason, list(places) or None)


def test_score_is_the_weighted_mean_of_the_numbers():
    tokens = spread(("80", 0.5), (" 90", 0.2), ("90", 0.1), ("100", 0.1), ("The", 0.05), ("101", 0.01), ("007", 0.01))
    assert number_masses(tokens) == pytest.approx({80: 0.5, 90: 0.3, 100: 0.1})
    assert score_answer(answer("80", ("80", tokens))).score == pytest.approx((40 + 27 + 10) / 0.9)
    assert score_answer(answer("80", ("80", tokens))).source == "log-probabilities"


def test_too_little_mass_is_no_score():
    assert weighted_mean({50: 0.2499}) is None and weighted_mean({50: 0.2501}) == 50
    refusal = answer("I can't", ("I", spread(("I", 0.7), ("50", 0.2))), ("can't", spread(("can't", 0.9))))
    assert score_answer(refusal) == (None, "log-probabilities")
    assert weighted_mean({}) is None


def test_digits_in_tokens_of_their_own():
    digits = spread(("8", 0.6), ("7", 0.3), ("1", 0.05))
    split = answer("85", ("8", digits), ("5", spread(("5", 0.5), ("0", 0.4))))
    assert score_answer(split) == (85.0, "text")
    # 7 may be a score or the first digit of one: only the text tells
    assert score_answer(answer("7", ("7", digits))) == (7.0, "text")
    # a token of two digits among the candidates settles it
    whole = answer("7", ("7", spread(("7", 0.5), ("10", 0.5))))
    assert score_answer(whole) == (pytest.approx(8.5), "log-probabilities")
    # "10" "0"
    hundred = answer("100", ("10", spread(("10", 0.9), ("9", 0.1))), ("0", spread(("0", 0.9))))
    assert score_answer(hundred) == (100.0, "text")


def test_blank_first_token():
    numbers = spread(("85", 0.6), ("90", 0.4))
    blank = answer(" 85", (" ", spread((" ", 0.99))), ("85", numbers))
    assert score_answer(blank) == (pytest.approx(87), "log-probabilities")
    assert score_answer(answer("\u258185", ("\u258185", spread(("\u258185", 1.0))))).score == pytest.approx(85)


def test_what_follows_a_number_decides_whether_it_is_one():
    def said(*tokens, first=None):
        places = [(token, spread((token, 0.9), ("90", 0.1))) for token in tokens]
        return score_answer(answer("".join(tokens), *places))

    assert said("85", "/", "100").score == pytest.approx(85.5)
    for tokens in (["8", "/", "10"], ["8", " out", " of", " 10"], ["1", ".", " The", " answer"], ["3", " errors"]):
        assert said(*tokens) == (None, "log-probabilities")
    assert said("7", ".", "5") == (7.5, "text")  # the other candidates may be parts of numbers as well
    bold = answer("**85**", ("**", spread(("**", 0.9))), ("85", spread(("85", 0.6), ("90", 0.4))), ("**", []))
    assert score_answer(bold) == (pytest.approx(87), "log-probabilities")
    # of numbers that the judge did not say, nobody knows how they would go on
    assert score_answer(answer("The", ("The", spread(("The", 0.4), ("80", 0.3), ("90", 0.3))))).score == 85


def test_reasoning_is_no_score():
    thought = spread(("<think>", 1.0))
    assert score_answer(answer("<think>8/10, so</think>\n85", ("<think>", thought))) == (85.0, "text")
    assert score_answer(answer("<think>maybe 70", ("<think>", thought), finish_reason="length")) == (None, "text")


SCORES = {
    "85": 85, " 85.5\n": 85.5, "85/100": 85, "Score: 85": 85, "0": 0, "100 of 100": 100, "100.0": 100, "**85**": 85,
    "85 out of 100": 85, '{"score": 85}': 85, "85%": 85, "85 percent": 85, "85 points out of 100": 85, "[[85]]": 85,
    "<score>85</score>": 85, "85. The answer is formal": 85, "85, because it is": 85, "85 because it is": 85,
    "85\n\nThe answer has 3 errors": 85, "85 (very formal)": 85, "I would give it 85.": 85, "The score is 85": 85,
    "Score: **85**/100": 85, "得分：85分": 85, "85 - very formal": 85, "Formality: 85": 85, "７０": 70, "- 85": 85,
    "I'd rate this a 90 out of 100.": 90, "5": 5, "5\n\nbecause it is rude": 5, "[[5]]": 5, '{"score": 5}': 5,
    "It is not bad. I'd give it 85": 85,
    "<think> it is 8/10 </think>\n85": 85, "[THINK]maybe 70[/THINK]Score: 85": 85,
    "<|channel|>analysis<|message|>7/10<|end|><|start|>assistant<|channel|>final<|message|>85": 85,
}  # fmt: skip
NO_SCORES = [
    "4 ★", "Rating: 4⭐", "I can't give a score above 50", "I would not say 85", "It scores less than 50",
    "8/10", "8 / 10", "8 out of 10", "4/5", "Score: 8/10", "9 out of ten", "8.5/10", "50/50", "1/2", "8½",  # scales
    "4 stars", "Rating: 4 stars", "0.85", "1.0", "Score: 0.85", "8/", "1e2",
    "1. The answer is", "1) The answer", "(1) The answer", "[1] The answer", "1: The answer", "1. 85", "#1",  # lists
    "3 errors", "I found 3 errors", "There are 3.", "5 of 7 sentences", "5 of the sentences", "20-ish", "3rd", "v85",
    "70-80", "70 - 80", "70–80", "70 to 80", "between 70 and 80", "85 or 90", "<50", "> 50", "5+",  # ranges
    "2024-05-01", "12.05.2024", "05/01/2024", "12 May 2024", "May 12", "10:30",  # dates
    "-5", "−5", "Score: -5", "101", "1000", "1,000", "007", "85,5", "85, 90", "85\n90", "85?", "from 0 to 100: 85",
    "<think> maybe 70", "[THINK] 85", "<|channel|>analysis<|message|>85", "", "REFUSAL", "I'm not sure",
]  # fmt: skip


@pytest.mark.parametrize(("text", "score"), [*SCORES.items(), *((text, None) for text in NO_SCORES)])
def test_score_of_a_text(text, score):
    assert score_text(text) == score


def test_number_that_may_be_cut_off():
    for text in ("8", "The score is 8", "1.", "8 of", "85 -"):
        assert score_text(text, cut_off=True) is None
    assert score_answer(answer("The score is 8", finish_reason="length")) == (None, "text")
    assert score_text("8 of 100, for it is", cut_off=True) == 8 == score_text("8\n\nThe", cut_off=True)
