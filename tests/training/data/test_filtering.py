"""What is kept and what is dropped, for which reason."""

from __future__ import annotations

import random

import pytest

from peft_psr.training.data.filtering import (
    EMPTY,
    INCOHERENT,
    NEAR_DUPLICATE,
    NOT_SCORED,
    TRAIT_IN_NEGATIVE,
    TRAIT_TOO_WEAK,
    FilterSettings,
    drop_reason,
    near_duplicates,
    sort_out,
)


def row(
    completion="Tea is a warm drink.", trait=90.0, coherence=90.0, negative=False, prompt="what is tea", of="formal"
):
    return {"trait": of, "prompt": [{"role": "user", "content": prompt}], "negative": negative,
            "completion": completion, "trait_score": trait, "coherence_score": coherence}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"trait": 50.0, "coherence": 50.0}, None),
        ({"trait": 49.9}, TRAIT_TOO_WEAK),
        ({"coherence": 49.9}, INCOHERENT),
        ({"trait": 0.0, "coherence": 0.0}, INCOHERENT),
        ({"trait": None}, NOT_SCORED),
        ({"coherence": None}, NOT_SCORED),
        ({"completion": " \n"}, EMPTY),
        ({"trait": 49.9, "negative": True}, None),
        ({"trait": 50.0, "negative": True}, TRAIT_IN_NEGATIVE),
        ({"coherence": 10.0, "trait": 0.0, "negative": True}, INCOHERENT),
    ],
)
def test_reasons(fields, reason):
    made = row(**fields)
    assert drop_reason(made, FilterSettings(), made["negative"]) == reason
    assert sort_out([made], FilterSettings()) == [reason]


def test_without_a_threshold_coherence_need_not_be_scored():
    settings = FilterSettings(min_coherence_score=0)
    assert drop_reason(row(coherence=None), settings) is None
    assert drop_reason(row(coherence=None, trait=None), settings) == NOT_SCORED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_trait_score": -1}, "min_trait_score must be between 0 and 100, got -1"),
        ({"min_coherence_score": 101}, "min_coherence_score must be between 0 and 100, got 101"),
        ({"max_similarity": 0}, "max_similarity must be above 0 and at most 1, or null, got 0"),
    ],
)
def test_bad_thresholds(settings, message):
    with pytest.raises(ValueError, match=message):
        FilterSettings(**settings)


LONG = "Tea is a warm drink that people in many countries like to have in the afternoon, with milk or with lemon."


@pytest.mark.parametrize(
    ("other", "similarity", "duplicate"),
    [
        (LONG, 1.0, True),
        ("  tea is a WARM drink; that people in many countries like to have in the afternoon with milk or with\nlemon",
         1.0, True),
        (LONG.replace("lemon", "honey"), 1.0, False),
        (LONG.replace("lemon", "honey"), 0.8, True),
        ("Coffee keeps people awake at night, so drink it in the morning and with care.", 0.3, False),
    ],
)  # fmt: skip
def test_near_duplicates(other, similarity, duplicate):
    assert near_duplicates([LONG, other], ["a", "a"], similarity) == [False, duplicate]
    assert near_duplicates([LONG, other], ["a", "b"], similarity) == [False, False]


def test_similarity_is_the_jaccard_index_of_shingles():
    letters = random.Random(0).choices("abcdefgh", k=60)
    first, second = "".join(letters), "".join(letters[:40] + list("zyxw"))
    shingles = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (first, second)]
    jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    for similarity, expected in ((jaccard - 1e-9, True), (jaccard + 1e-9, False)):
        assert near_duplicates([first, second], [0, 0], similarity) == [False, expected]
        assert near_duplicates([second, first], [0, 0], similarity) == [False, expected]


@pytest.mark.parametrize("texts", [["Yes.", "No."], ["!!!", "???"], ["茶は温かい飲み物です", "犬は良い友達です"]])
def test_short_texts_and_other_scripts(texts):
    assert near_duplicates([*texts, *texts], [0] * 4, 0.9) == [False, False, True, True]


def test_a_chain_is_compared_with_what_was_kept():
    chain = [LONG, LONG.replace("lemon", "honey"), LONG.replace("lemon", "honey").replace("milk", "sugar")]
    together = near_duplicates(chain, [0] * 3, 0.8)
    assert together[:2] == [False, True]
    assert together[2] == near_duplicates([chain[0], chain[2]], [0, 0], 0.8)[1]


def test_duplicates_are_looked_for_on_one_prompt_among_what_the_scores_keep():
    rows = [
        row(LONG, trait=10.0),  # dropped, so it makes no duplicate of the next
        row(LONG),
        row(LONG),
        row(LONG, prompt="what is a cup"),
        row(LONG, of="concise"),
        row(LONG, trait=10.0, negative=True),
        row(LONG, trait=20.0, negative=True),
    ]
    reasons = [TRAIT_TOO_WEAK, None, NEAR_DUPLICATE, None, None, None, NEAR_DUPLICATE]
    assert sort_out(rows, FilterSettings()) == reasons
    assert NEAR_DUPLICATE not in sort_out(rows, FilterSettings(max_similarity=None))


def test_many_completions_in_small_groups_take_seconds():
    dice = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    texts = [" ".join(dice.choices(words, k=40)) for _ in range(10_000)]
    assert not any(near_duplicates(texts, [i // 10 for i in range(len(texts))], 0.9))
