"""A judge's number from its words: only one that can be nothing but the answer on the scale of 0 to 100.

Either the answer opens with the number, or it holds one number alone and says that it is a score ("Score: 85", "I'd
give it 85"). No score are numbers of another scale (8/10, 4 stars, 0.8), of a list (1. ...), of a range (70-80),
counts (3 errors), dates, several numbers in a row, and whatever stands in reasoning.
"""

import re
import unicodedata
from typing import NamedTuple

from peft_psr.prompts.reasoning import split_reasoning


_MENTION = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?)"
    r"(?:\s*(?P<unit>%|percent\b|points?\b|pts\b|分|点|점))?"
    r"(?:\s*(?:/|\bout of\b|\bof\b)\s*(?P<scale>[0-9]+(?:\.[0-9]+)?))?"
    r"(?P<unit_of_scale>\s*(?:%|percent\b|points?\b|pts\b))?",
    re.IGNORECASE,
)
_SCALE_0_100 = re.compile(r"(?:0|[1-9][0-9]?|100)(?:\.[0-9]+)?|100\.0+")
_DECORATION = re.compile(r"[*_`]+|</?[A-Za-z]\w*>|\\boxed\b")
_NOT_BEFORE = re.compile(
    r"(?:[\w.,/+#$€£<>≤≥≈⁄-]|[0-9]:|[−–—]|[<>≤≥−]\s|[0-9]\s*(?:to|through|or|and|[-–—])\s)$", re.IGNORECASE
)
_NOT_AFTER = re.compile(
    r"[/⁄:.,'’][0-9]"  # a date, a time, a version, thousands, a decimal comma
    r"|\s*[/⁄?+★☆⭐]"  # a fraction that breaks off; a doubt; a bound; stars
    r"|\s*(?:[-–—−~]|to\b|through\b|or\b|and\b)\s*[0-9]"  # a range, alternatives
    r"|[\s,;&|]+[0-9]"  # numbers in a row
    r"|[-–—]?\w|[^\S\n]+(?!(?:because|since|as|for|due|given|based|overall)\b)\w",  # a count, an ordinal, a unit
    re.IGNORECASE,
)
_LIST_NUMBER = re.compile(r"[0-9][.):\]](?:[^\S\n]*[^\s0-9\])}\"']|[^\S\n]+[0-9])")
_LABEL = re.compile(r"(?:[:=]|\s[-–—])[\s\"'({\[]*$")
_CUE = re.compile(
    r"\b(?:scor(?:e|es|ed|ing)|rat(?:e|es|ed|ing)|grad(?:e|es|ed|ing)|mark|give|gave|assign|evaluat\w+|estimate|"
    r"judge|say|go with|answer is|number is|it at)\b",
    re.IGNORECASE,
)
_BOUND = re.compile(r"\b(?:not|never|above|below|over|under|more|less|than|least|most)\b|n['’]t\b", re.IGNORECASE)
"""In the sentence of a number: it says what the score is not."""


class _Mention(NamedTuple):
    """A number in a text, with the rest of the line around it."""

    value: float
    before: str
    after: str
    is_score: bool


def score_text(text: str, cut_off: bool = False) -> float | None:
    """The score 0-100 in a judge's answer; `None` unless there is a number that can only be that.

    Args:
        text: The answer, with its reasoning if it has any: what follows that is read, nothing where it did not end.
        cut_off: The text ended at a token limit, so that what it ends with may lack its end.
    """
    answer = split_reasoning(text).answer
    if answer is None:
        return None
    answer = _DECORATION.sub(" ", unicodedata.normalize("NFKC", answer)).strip()
    mentions = [_mention(answer, match) for match in _MENTION.finditer(answer)]
    if not mentions:
        return None
    first = mentions[0]
    opens = not re.search(r"\w", first.before)
    if not first.is_score or (cut_off and not re.search(r"\w|\n", first.after)):
        return None
    if not opens and (len(mentions) > 1 or not _is_labelled(first.before)):
        return None
    if opens and _LIST_NUMBER.match(answer[len(first.before) :]):
        return None
    return first.value


def _mention(text: str, match: re.Match[str]) -> _Mention:
    before, after = text[: match.start()], text[match.end() :]
    number, scale = match["number"], match["scale"]
    on_scale = scale is None or float(scale) == 100
    ratio = "." in number and float(number) <= 1  # of a scale 0-1, as likely as not
    has_unit = scale is not None or bool(match["unit"] or match["unit_of_scale"])
    following = _NOT_AFTER.match(after)
    words_after = following is not None and (not has_unit or not re.match(r"\s+[^\W\d]", after))
    fits = bool(_SCALE_0_100.fullmatch(number)) and float(number) <= 100
    return _Mention(
        float(number),
        before,
        after,
        fits and on_scale and not ratio and not words_after and not _NOT_BEFORE.search(before),
    )


def _is_labelled(before: str) -> bool:
    sentence = re.split(r"[.!?\n]", before)[-1]
    return bool(_LABEL.search(before) or (_CUE.search(sentence) and not _BOUND.search(sentence)))
