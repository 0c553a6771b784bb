"""What becomes of judged completions: kept to train on, kept apart as negatives, or dropped for a reason.

Thresholds as in METHOD 5: both scores at least 50 of 100. Near-duplicates are found by the Jaccard similarity of
character shingles (Broder, "On the resemblance and containment of documents", 1997).
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peft_psr.prompts.reasoning import split_reasoning

from .triplets import Triplet, check_scale


SHINGLE_LENGTH = 5

EMPTY = "empty completion"
NO_ANSWER = "reasoning without an answer"
UNFIT = "tokens that can't be trained on"
TOO_LONG = "longer than the model's context"
NOT_SCORED = "the judge could not tell"
INCOHERENT = "incoherent"
TRAIT_TOO_WEAK = "trait too weak"
TRAIT_IN_NEGATIVE = "negative with the trait"
NEAR_DUPLICATE = "near-duplicate"
REASONS = (
    EMPTY, NO_ANSWER, UNFIT, TOO_LONG, NOT_SCORED, INCOHERENT, TRAIT_TOO_WEAK, TRAIT_IN_NEGATIVE, NEAR_DUPLICATE,
)  # fmt: skip
"""Why a completion is dropped, in the order in which the reasons are looked at."""

Row = TypeVar("Row", bound=Mapping[str, Any])


@dataclass(frozen=True)
class FilterSettings:
    """Thresholds of the filter.

    Attributes:
        min_trait_score: 0-100. A positive needs as much, a negative must have less.
        min_coherence_score: 0-100; 0 also keeps completions without a coherence score.
        max_similarity: 0-1; a completion is dropped if it is at least this similar to one kept before it on the same
            bare prompt. 1 drops only equal ones (up to case, blanks and punctuation), `None` none.

    Raises:
        ValueError: a threshold outside its range.
    """

    min_trait_score: float = 50.0
    min_coherence_score: float = 50.0
    max_similarity: float | None = 0.9

    def __post_init__(self) -> None:
        for name in ("min_trait_score", "min_coherence_score"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} must be between 0 and 100, got {getattr(self, name)}.")
        if self.max_similarity is not None and not 0 < self.max_similarity <= 1:
            raise ValueError(f"max_similarity must be above 0 and at most 1, or null, got {self.max_similarity}.")


def answer_of(row: Mapping[str, Any]) -> str | None:
    """Returns what there is to judge of a completion: all but finished reasoning; None where it was cut off."""
    return split_reasoning(row["completion"], bool(row.get("reasoning_opened"))).answer


def has_answer(row: Mapping[str, Any]) -> bool:
    """Returns whether a completion says something."""
    return bool((answer_of(row) or "").strip())


def drop_reason(row: Mapping[str, Any], settings: FilterSettings, negative: bool = False) -> str | None:
    """Returns why a completion is dropped by its own text and scores, one of `REASONS`; None if it is not.

    Without `trait_score`, `coherence_score` nobody knows whether it belongs; `unusable`, if it is there, is why it
    can't
    be trained on, found when it was drawn. A `negative` was drawn to be without the trait.
    """
    trait, coherence = row.get("trait_score"), row.get("coherence_score")
    if not row["completion"].strip():
        return EMPTY
    if not has_answer(row):
        return NO_ANSWER
    if row.get("unusable"):
        return row["unusable"]
    if trait is None or (coherence is None and settings.min_coherence_score > 0):
        return NOT_SCORED
    if coherence is not None and coherence < settings.min_coherence_score:
        return INCOHERENT
    if negative:
        return TRAIT_IN_NEGATIVE if trait >= settings.min_trait_score else None
    return TRAIT_TOO_WEAK if trait < settings.min_trait_score else None


def near_duplicates(texts: Sequence[str], groups: Sequence[Hashable], max_similarity: float) -> list[bool]:
    """Returns, for each text, whether it is all but equal to an earlier one of its group that is no duplicate itself.

    Texts are compared within a group only: the same answer to another question is another example, and the time grows
    with the square of a group, not of the whole. From a Jaccard similarity, 0-1, of `max_similarity` on two are alike.
    """
    kept: dict[Hashable, list[frozenset[str]]] = defaultdict(list)
    duplicates = []
    for text, group in zip(texts, groups, strict=True):
        shingles = _shingles(text)
        duplicate = any(_at_least_as_similar(shingles, other, max_similarity) for other in kept[group])
        if not duplicate:
            kept[group].append(shingles)
        duplicates.append(duplicate)
    return duplicates


def _shingles(text: str) -> frozenset[str]:
    """Runs of characters of the normalised text; the text itself if it is shorter."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(words) or text.strip()
    return frozenset(text[i : i + SHINGLE_LENGTH] for i in range(max(1, len(text) - SHINGLE_LENGTH + 1)))


def _at_least_as_similar(first: frozenset[str], second: frozenset[str], similarity: float) -> bool:
    smaller, larger = sorted((len(first), len(second)))
    if smaller < similarity * larger:  # the share of common shingles can't be higher
        return False
    common = len(first & second)
    return common >= similarity * (smaller + larger - common)


def sort_out(rows: Sequence[Row], settings: FilterSettings) -> list[str | None]:
    """Returns for each row why it is dropped, one of `REASONS`, or None if it is kept.

    Rows are as for `drop_reason`, with `trait`, `prompt` (x) and `negative`. Near-duplicates are looked for among what
    the scores keep, positives and negatives apart, on the same trait and the same x, whatever the instruction; the
    first of them is kept.
    """
    reasons = [drop_reason(row, settings, row["negative"]) for row in rows]
    if settings.max_similarity is None:
        return reasons
    left = [i for i, reason in enumerate(reasons) if reason is None]
    duplicates = near_duplicates(
        [rows[i]["completion"] for i in left],
        [(rows[i]["trait"], rows[i]["negative"], repr(rows[i]["prompt"])) for i in left],
        settings.max_similarity,
    )
    for i, duplicate in zip(left, duplicates, strict=True):
        if duplicate:
            reasons[i] = NEAR_DUPLICATE
    return reasons


def filter_triplets(
    triplets: Iterable[Triplet],
    min_trait_score: float = 50.0,
    min_coherence_score: float = 50.0,
    keep_negatives: bool = False,
) -> list[Triplet]:
    """Keep coherent completions that show the trait (METHOD 5: both scores at least 50 of 100).

    A completion without a score is dropped: nobody knows whether it belongs. Near-duplicates stay.

    Args:
        triplets: Scored triplets.
        min_trait_score: 0-100.
        min_coherence_score: 0-100; 0 also keeps completions without a coherence score.
        keep_negatives: Keep coherent completions without the trait too, for training with negative strength.

    Raises:
        ValueError: a threshold outside 0-100, scores given as 0-1, or nothing is left.
    """
    settings = FilterSettings(min_trait_score, min_coherence_score, max_similarity=None)
    accepted = (None, TRAIT_TOO_WEAK) if keep_negatives else (None,)
    triplets = list(triplets)
    check_scale(triplets, "filter_triplets")
    kept = [triplet for triplet in triplets if drop_reason(triplet, settings) in accepted]
    if not kept:
        raise ValueError(
            f"None of {len(triplets)} triplets has trait_score >= {min_trait_score} and coherence_score >= "
            f"{min_coherence_score}. Look at a few completions: the instruction may not elicit the trait."
        )
    return kept
