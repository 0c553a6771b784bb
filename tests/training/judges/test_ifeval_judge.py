"""IFEval's published checkers as a judge.

Real files are read where PSR_TEST_DATA names a folder that holds `ifeval/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.ifeval import read, row

from peft_psr.training.judges.base import Judge, JudgeScores
from peft_psr.training.judges.ifeval import Followed, IFEvalJudge
from peft_psr.training.sources.ifeval import read_ifeval


needs_checkers = pytest.mark.skipif(
    not all(find_spec(name) for name in ("lm_eval", "langdetect", "nltk")),
    reason="the extra ifeval is not installed",
)
REAL_DATA = Path(os.environ.get("PSR_TEST_DATA", "")) / "ifeval"

SENTENCES = {
    "de": "Das ist ein ganz gewöhnlicher Satz über das Wetter in der Stadt.",
    "fr": "Ceci est une phrase tout à fait ordinaire sur le temps dans la ville.",
    "ru": "Это самое обычное предложение о погоде в нашем городе.",
    "ko": "이것은 우리 도시의 날씨에 관한 아주 평범한 문장입니다.",
    "ar": "هذه جملة عادية جدا عن الطقس في المدينة هذا اليوم.",
    "fa": "این یک جملهٔ کاملاً معمولی دربارهٔ آب و هوای شهر ما است که می‌گوید چه گذشت.",
    "ur": "یہ ہمارے شہر کے موسم کے بارے میں ایک بالکل عام جملہ ہے۔",
    "hi": "यह हमारे शहर के मौसम के बारे में एक बहुत ही साधारण वाक्य है।",
    "mr": "हे आमच्या शहरातील हवामानाबद्दल एक अगदी साधे वाक्य आहे.",
    "ne": "यो हाम्रो सहरको मौसमको बारेमा एउटा धेरै सामान्य वाक्य हो।",
    "kn": "ಇದು ನಮ್ಮ ನಗರದ ಹವಾಮಾನದ ಬಗ್ಗೆ ಒಂದು ಸಾಮಾನ್ಯ ವಾಕ್ಯ.",
    "te": "ఇది మా నగర వాతావరణం గురించి ఒక సాధారణ వాక్యం.",
    "gu": "આ અમારા શહેરના હવામાન વિશે એક સામાન્ય વાક્ય છે.",
    "pa": "ਇਹ ਸਾਡੇ ਸ਼ਹਿਰ ਦੇ ਮੌਸਮ ਬਾਰੇ ਇੱਕ ਆਮ ਵਾਕ ਹੈ।",
    "sw": "Hii ni sentensi ya kawaida kabisa kuhusu hali ya hewa katika mji wetu leo.",
}
PROSE = "This is a plain English sentence about the weather, which was fine"


def obeying(instruction, kwargs):
    """A completion that follows an instruction."""
    capitals = kwargs.get("capital_frequency", 0) if kwargs.get("capital_relation") == "at least" else 0
    return {
        "change_case:capital_word_frequency": lambda: f"it was {'NICE ' * capitals}out there",
        "change_case:english_capital": lambda: PROSE.upper(),
        "change_case:english_lowercase": lambda: PROSE.lower(),
        "detectable_format:constrained_response": lambda: "My answer is yes.",
        "detectable_format:json_format": lambda: '```json\n{"weather": ["fine", 1]}\n```',
        "detectable_format:multiple_sections": lambda: "\n".join(
            f"{kwargs['section_spliter']} {i}\n{PROSE}" for i in range(1, kwargs["num_sections"] + 1)
        ),
        "detectable_format:number_bullet_lists": lambda: "* fine day\n" * kwargs["num_bullets"],
        "detectable_format:number_highlighted_sections": lambda: "*fine* weather " * kwargs["num_highlights"],
        "detectable_format:title": lambda: f"<<Weather>>\n{PROSE}",
        "keywords:existence": lambda: f"{PROSE} {' '.join(kwargs['keywords'])}",
        "keywords:forbidden_words": lambda: "zzz",
        "language:response_language": lambda: SENTENCES[kwargs["language"]],
        "punctuation:no_comma": lambda: PROSE.replace(",", ""),
        "startend:end_checker": lambda: f"{PROSE}. {kwargs['end_phrase']}",
        "startend:quotation": lambda: f'"{PROSE}"',
    }[instruction]()


def breaking(instruction, kwargs):
    """A completion that is as good but for the instruction."""
    if instruction == "keywords:forbidden_words":
        return f"{PROSE} {kwargs['forbidden_words'][0]}"
    if instruction == "keywords:existence":
        return "zzz"
    if instruction == "change_case:capital_word_frequency" and kwargs["capital_relation"] == "less than":
        return "NICE " * kwargs["capital_frequency"]
    return PROSE


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """Punkt without any abbreviation learnt: the layout of NLTK's data, with empty tables."""
    nltk = pytest.importorskip("nltk")
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])


CASES = [
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"}),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:json_format", {}),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 3}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 4}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ("detectable_format:title", {}),
    ("keywords:existence", {"keywords": ["sun", "rain"]}),
    ("keywords:forbidden_words", {"forbidden_words": ["snow"]}),
    ("language:response_language", {"language": "fr"}),
    ("punctuation:no_comma", {}),
    ("startend:end_checker", {"end_phrase": "That is all."}),
    ("startend:quotation", {}),
]


@needs_checkers
@pytest.mark.parametrize(("instruction", "kwargs"), CASES)
def test_followed_is_100_and_broken_is_0(tmp_path, punkt, instruction, kwargs):
    unset = {name: None for name in ("num_bullets", "language", "keywords") if name not in kwargs}
    pair = read(tmp_path, row(instruction, kwargs | unset))[0]
    texts = [obeying(instruction, kwargs), breaking(instruction, kwargs), " \n"]
    scores = IFEvalJudge([pair]).score([pair.prompt] * 3, texts)
    assert scores == [JudgeScores(100.0, None), JudgeScores(0.0, None), JudgeScores(0.0, None)]


def forms(text):
    """The published looser forms of a completion: without first line, last line, asterisks, in every combination."""
    lines = text.split("\n")
    shorter = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*shorter, *(form.replace("*", "") for form in shorter)]


@needs_checkers
@pytest.mark.parametrize(("instruction", "kwargs"), CASES)
def test_loose_is_strict_on_any_of_eight_forms(tmp_path, punkt, instruction, kwargs):
    pair = read(tmp_path, row(instruction, kwargs))[0]
    judge = IFEvalJudge([pair])
    good, bad = obeying(instruction, kwargs), breaking(instruction, kwargs)
    around = ["{}", "Sure, Here:\n{}", "{}\nThat, Was it*", "Sure, Here:\n{}\nThat, Was it", "**{}**", "*\n{}\n*"]
    texts = [form.format(text) for form in around for text in (good, bad)] + ["", "\n", "*"]
    for text, found in zip(texts, judge.followed([pair] * len(texts), texts), strict=True):
        strict = [score.trait == 100 for score in judge.score([pair.prompt] * 8, forms(text))]
        assert found == Followed(strict[0], any(strict)), text


@needs_checkers
def test_loosely_each_instruction_may_be_followed_by_another_form(tmp_path):
    both = row() | {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    pair = read(tmp_path, both)[0]
    judge = IFEvalJudge([pair], coherence=None)
    # without its first line there is no comma, without its last it is quoted
    assert judge.followed([pair], ['"Well, yes"\nfine']) == [Followed(False, True)]
    assert judge.followed([pair], ['"fine"']) == [Followed(True, True)]
    assert judge.followed([pair], ["fine, warm"]) == [Followed(False, False)]
    with pytest.raises(ValueError, match="not made with the pair"):
        judge.followed(read(tmp_path, row()), ["a"])


@needs_checkers
def test_every_instruction_of_a_prompt_must_be_followed(tmp_path):
    both = row() | {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    pair = read(tmp_path, both)[0]
    scores = IFEvalJudge([pair])([pair.prompt] * 3, ['"fine day"', "fine day", '"fine, warm"'])
    assert [score.trait for score in scores] == [100, 0, 0]


class FakeCoherence(Judge):
    def __init__(self):
        self.prompts = []

    def score(self, prompts, completions, pairs=None):
        self.usage["calls"] += len(prompts)
        self.prompts += prompts
        return [JudgeScores(1.0, 77.0), JudgeScores(None, None, "timeout")]

    def describe(self):
        return {"judge": "fake"}


@needs_checkers
def test_coherence_comes_from_the_other_judge(tmp_path):
    pair = read(tmp_path, row())[0]
    coherence = FakeCoherence()
    judge = IFEvalJudge([pair], coherence)
    assert judge.score([pair.prompt] * 2, ["fine", "fine"]) == [
        JudgeScores(100.0, 77.0),
        JudgeScores(None, None, "timeout"),
    ]
    assert coherence.prompts == [pair.prompt] * 2 and judge.usage == {"calls": 2}
    description = judge.describe()
    assert description["coherence"] == {"judge": "fake"} and description["checkers"].startswith("lm-eval ")
    json.dumps(description)
    assert IFEvalJudge([pair]).describe()["coherence"] is None and IFEvalJudge([pair]).usage == {}


@needs_checkers
def test_a_bare_prompt_of_several_pairs_is_not_guessed(tmp_path):
    pairs = read(tmp_path, row(), row("startend:quotation"))
    judge = IFEvalJudge(pairs[:1])
    assert judge([pairs[0].prompt], ["a"]) == [JudgeScores(100.0, None)]
    with pytest.raises(ValueError, match="not made with the pair 'startend:quotation/7/0'"):
        judge.score([pair.prompt for pair in pairs], ["a", "b"], pairs)
    with pytest.raises(ValueError, match="belongs to 2 of the judge's pairs.*Give `score` the pairs"):
        IFEvalJudge(pairs)([pairs[0].prompt], ["a"])
    with pytest.raises(ValueError, match="belongs to 0"):
        judge([[{"role": "user", "content": "Else?"}]], ["a"])


@needs_checkers
@pytest.mark.parametrize(
    ("instruction", "kwargs", "message"),
    [
        ("language:respons", {}, "No checker for language:respons. There are: .*language:response_language"),
        ("detectable_format:number_bullet_lists", {}, "no_key must be num_bullets, got {}"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 0}, "must be num_bullets, got {'num_bullets': 0}"),
        ("punctuation:no_comma", {"num_bullets": 3}, "no_key must be empty, got {'num_bullets': 3}"),
        ("language:response_language", {"language": "tlh"}, "no_key can't take .*tlh"),
    ],
)
def test_what_can_not_be_checked_is_refused_before_any_work(tmp_path, instruction, kwargs, message):
    pair = read(tmp_path, row(instruction, kwargs))[0]
    with pytest.raises(ValueError, match=message.replace("no_key", f"{instruction}.*")):
        IFEvalJudge([pair])


@needs_checkers
def test_data_that_a_checker_needs(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    pairs = read(tmp_path, row("change_case:capital_word_frequency", CASES[0][1]), row())
    with pytest.raises(FileNotFoundError, match="capital_word_frequency needs NLTK's.*nltk.downloader punkt_tab"):
        IFEvalJudge(pairs)
    IFEvalJudge(pairs[1:])


@needs_checkers
def test_nothing_is_downloaded(tmp_path):
    read(tmp_path, row())
    script = """
import sys, nltk
from peft_psr.training.judges.ifeval import IFEvalJudge
from peft_psr.training.sources.ifeval import read_ifeval
nltk.data.path[:] = []
nltk.download = lambda name: sys.exit(f"downloads {name}")
IFEvalJudge(read_ifeval(sys.argv[1]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "prompts.jsonl"], capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ImportError, match=r"pip install \"peft-psr\[ifeval\]\""):
        IFEvalJudge(read(tmp_path, row()))


@needs_checkers
def test_language_is_judged_the_same_every_time(tmp_path, monkeypatch):
    import langdetect

    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)  # as it comes
    pair = read(tmp_path, row("language:response_language", {"language": "it"}))[0]
    text = "no la me"  # Italian or Spanish, as the dice fall
    assert len(set(IFEvalJudge([pair]).score([pair.prompt] * 50, [text] * 50))) == 1


@needs_checkers
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="PSR_TEST_DATA names no folder with ifeval/")
def test_real_files(punkt):
    files = sorted(REAL_DATA.glob("*.jsonl"))
    assert files
    for path in files:
        pairs = read_ifeval(path)
        assert len(pairs) == sum(1 for _ in path.open(encoding="utf-8")) == len({pair.id for pair in pairs})
        judge = IFEvalJudge(pairs)
        asked = [(pair.metadata["instruction_id_list"][0], pair.metadata["kwargs"][0]) for pair in pairs]
        prompts = [pair.prompt for pair in pairs]
        followed = judge.score(prompts, [obeying(*each) for each in asked], pairs)
        broken = judge.score(prompts, [breaking(*each) for each in asked], pairs)
        wrong = [pair.id for pair, a, b in zip(pairs, followed, broken, strict=True) if (a.trait, b.trait) != (100, 0)]
        assert not wrong
