"""IFEval's folds, the numbers of its tables, and its figure."""

from __future__ import annotations

import statistics

import pytest

from peft_psr.evaluation.benchmarks.ifeval.report import accuracy_by_type, short_names
from peft_psr.evaluation.benchmarks.ifeval.scoring import (
    ScoredAnswer,
    accuracy,
    bare_text,
    coherence,
    family,
    rows_apart,
    split_folds,
)
from peft_psr.training import PromptPair


COMMAS, WORD, SHORT = "punctuation:no_comma", "keywords:existence", "length_constraints:number_words"


def pair(question, number=0, trait=COMMAS):
    return PromptPair(f"{trait}/{question}/{number}", trait, [{"role": "user", "content": question}], "")


# ---------------------------------------------------------------- folds


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_folds_hold_every_prompt_once_and_equal_bare_prompts_together(folds, seed):
    pairs = [pair(f"q{q}", number) for q in range(11) for number in range(1 + q % 3)]
    parts = split_folds(pairs, folds, seed)
    assert len(parts) == folds and sorted(p.id for part in parts for p in part) == sorted(p.id for p in pairs)
    questions = [{bare_text(p.prompt) for p in part} for part in parts]
    assert sum(map(len, questions)) == 11
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    assert parts == split_folds(pairs[::1], folds, seed) and [p for part in parts for p in part] != pairs


def test_folds_do_not_depend_on_the_order_of_the_file_but_on_the_seed():
    pairs = [pair(f"q{q}") for q in range(12)]
    first = [{p.id for p in part} for part in split_folds(pairs, 2, 0)]
    assert [{p.id for p in part} for part in split_folds(pairs[::-1], 2, 0)] == first
    assert any([{p.id for p in part} for part in split_folds(pairs, 2, seed)] != first for seed in range(1, 4))
    with pytest.raises(ValueError, match="2 different bare prompts can't be parted into 3 folds"):
        split_folds([pair("a"), pair("a", 1), pair("b")], 3, 0)


def test_rows_apart_knows_a_question_in_any_dress():
    system = {"role": "system", "content": "Be kind."}
    rows = [{"prompt": prompt} for prompt in ("a", [{"role": "user", "content": " a\n"}], "b")]
    rows.append({"prompt": [system, {"role": "user", "content": "a"}]})
    assert rows_apart(rows, [pair("a")]) == [{"prompt": "b"}]
    assert rows_apart(rows, [pair("c")]) == rows


# ---------------------------------------------------------------- numbers


def scored(question="q", trait=COMMAS, condition="none", **fields):
    values = {
        "model": "m", "trait": trait, "pair": f"{trait}/{question}", "question": question, "condition": condition,
        "seed": None, "fold": "", "alpha": None, "answer": "a", "truncated": False, "strict": False, "loose": False,
        "coherence": None,
    }  # fmt: skip
    return ScoredAnswer(**{**values, **fields})


def test_accuracy_is_the_share_of_answers_with_an_interval_over_bare_prompts():
    flags = [True, False, True, True, False, True]
    answers = [scored(f"q{i // 2}", strict=flag, loose=True) for i, flag in enumerate(flags)]
    value = accuracy(answers, "strict")
    assert value.mean == pytest.approx(100 * statistics.mean(flags)) and value.low < value.mean < value.high
    assert accuracy(answers, "loose").mean == 100 and accuracy([], "strict").mean is None
    # one bare prompt, asked with many words: its answers tell nothing of other questions
    assert accuracy([scored("q", strict=flag) for flag in flags], "strict").low is None


def test_coherence_says_what_it_lacks():
    answers = [scored(f"q{i}", coherence=score) for i, score in enumerate([80.0, 90.0, None])]
    value = coherence(answers, None)
    assert value.mean == 85 and value.why == "1 of 3 answers have no score"
    none = coherence([scored()], "no judge")
    assert none.mean is None and none.why == "no judge"


def test_families_and_names():
    assert [family(trait) for trait in (COMMAS, WORD, SHORT, "combination:two_responses")] == [
        "format",
        "keywords",
        "length",
        "format",
    ]
    assert family(f"{COMMAS} + {WORD}") == "format + keywords"
    assert list(short_names([COMMAS, "a:b", "c:b"]).values()) == ["no_comma", "a:b", "c:b"]


def test_figure_has_a_bar_for_each_type_and_condition():
    conditions = ("none", "prompt", "S-PSR LL", "S-PSR LL + prompt")
    types = [COMMAS, WORD, "a:b", "a:c", "a:d"]
    answers = [scored(f"q{i}", t, c, strict=i > 0) for t in types for c in conditions for i in range(4)]
    panels = [axes for axes in accuracy_by_type(answers, "m").axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["no_comma", "existence", "b", "c", "d"]
    for axes in panels:
        assert [bar.get_width() for bar in axes.patches] == [75.0] * 4
        assert [bar.get_hatch() for bar in axes.patches] == [None, None, None, "///"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(conditions)
