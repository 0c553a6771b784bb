"""IFEval prompts with and without their instruction, judged by the published checkers.

The checkers are those of EleutherAI's lm-eval (extra `ifeval`), which keeps Google's code (Zhou et al., arXiv
2311.07911). "Strict" and "loose" as there: every instruction of a prompt must be followed, and an empty completion
follows none; loosely, each may be followed by what is left without first line, last line or asterisks.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

from peft_psr.prompts.messages import Message
from peft_psr.text import check_unicode, parse_json, text_lines
from peft_psr.training.data.draws import PromptPair
from peft_psr.training.judges.base import Judge, JudgeScores

from .base import Selection, Source


logger = logging.getLogger(__name__)

# These split text into sentences or words with NLTK's punkt_tab.
_NEED_PUNKT = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
_PUNKT = "tokenizers/punkt_tab/english/"
_NOT_INSTALLED = 'IFEval\'s checkers are not installed. Install them with `pip install "peft-psr[ifeval]"`.'


class Followed(NamedTuple):
    """Whether a completion follows all instructions of its prompt, by the published checkers.

    Attributes:
        strict: As it stands.
        loose: In one of the eight published forms: with or without first line, last line and asterisks. An instruction
            may be followed by another form than the next; what is strict is loose too.
    """

    strict: bool
    loose: bool


class PairJudge(Protocol):
    """A judge that must know which instruction was given: one bare prompt may occur with several."""

    def judge_pairs(self, pairs: Sequence[PromptPair], completions: Sequence[str]) -> list[JudgeScores]:
        """Score `completions[i]`, drawn on `pairs[i]` or on its bare prompt; one `JudgeScores` each, in order."""
        ...


def read_ifeval(path: str | Path, instruction_ids: Collection[str] | None = None) -> list[PromptPair]:
    """Reads IFEval prompts that come with a copy without the instruction.

    Args:
        path: JSONL with `prompt`, `prompt_without_instruction`, `instruction_id_list` and `kwargs` on each line; or a
            folder of such files, read by name.
        instruction_ids: Keep the prompts with these instructions, or with these traits, only; all by default.

    Returns:
        Pairs whose steered prompt is `prompt` and whose prompt is `prompt_without_instruction`, both one user turn.
        `trait` is the instruction id (several are joined by " + "), `id` is `<trait>/<key>/<occurrence of the key>`,
        `metadata` holds `instruction_id_list`, `kwargs` and `key`.

    Raises:
        FileNotFoundError: no such file or folder, or no `.jsonl` in it.
        ValueError: a line is malformed (the message names line and field), or none has the instructions asked for.
    """
    files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].exists():
        raise FileNotFoundError(
            f"IFEval's prompts are not at {str(path)!r}: give their JSONL file or a folder of them."
        )
    pairs = []
    occurrences: Counter[tuple[str, str]] = Counter()
    found = set()
    for file in files:
        for number, line in text_lines(file):
            row = _checked_row(line, f"{file}, line {number}")
            trait, key = " + ".join(row["instruction_id_list"]), str(row.get("key", number))
            found.add(trait)
            occurrence = occurrences[trait, key]
            occurrences[trait, key] += 1
            if instruction_ids is not None and trait not in instruction_ids:
                if not set(row["instruction_id_list"]) <= set(instruction_ids):
                    continue
            pairs.append(
                PromptPair(
                    id=f"{trait}/{key}/{occurrence}",
                    trait=trait,
                    prompt=[{"role": "user", "content": row["prompt_without_instruction"]}],
                    steered_prompt=[{"role": "user", "content": row["prompt"]}],
                    metadata={name: row[name] for name in ("instruction_id_list", "kwargs")} | {"key": key},
                )
            )
    if not pairs:
        asked = "" if instruction_ids is None else f" with {', '.join(sorted(instruction_ids))}"
        raise ValueError(f"{path} holds no prompts{asked}. Its instructions: {', '.join(sorted(found)) or 'none'}.")
    return pairs


class IFEvalSource(Source):
    """IFEval's prompts, whose instruction is part of their text."""

    needs_data = True
    takes_instruction = False
    judge = "ifeval"

    def pairs(self, wanted: Selection) -> list[PromptPair]:
        """As `Source.pairs`, without the prompts that are the same without their instruction."""
        seen: Counter[str] = Counter()
        pairs = []
        for pair in read_ifeval(wanted.data or "", wanted.traits or None):
            if pair.prompt == pair.steered_prompt:  # the published files have a few
                logger.warning("%s is left out: its prompt is the same without the instruction.", pair.id)
                continue
            seen[pair.trait] += 1
            if wanted.questions is None or seen[pair.trait] <= wanted.questions:
                pairs.append(pair)
        return pairs


SOURCE = IFEvalSource()


class IFEvalJudge:
    """Trait score 100 where every instruction of the prompt is followed, 0 where not; coherence from another judge.

    Args:
        pairs: What it may be asked about, as `read_ifeval` gives them.
        coherence: A judge whose coherence score is passed on; without one the coherence score is `None`.

    Raises:
        ImportError: the extra `ifeval` is not installed.
        ValueError: a pair's instruction has no checker, or its `kwargs` are not those the checker takes.
        FileNotFoundError: a checker needs NLTK's punkt_tab, which is not on this machine.
    """

    def __init__(self, pairs: Iterable[PromptPair], coherence: Judge | None = None) -> None:
        self.coherence = coherence
        self._pairs = {pair.id: pair for pair in pairs}
        ids = {name for pair in self._pairs.values() for name in _instruction_ids(pair)}
        classes = _load_checkers(ids)
        self._checkers = {pair.id: _build_checkers(pair, classes) for pair in self._pairs.values()}
        self._by_prompt: dict[str, list[PromptPair]] = {}
        for pair in self._pairs.values():
            self._by_prompt.setdefault(_key(pair.prompt), []).append(pair)

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[JudgeScores]:
        """Scores completions of bare prompts that belong to one pair each; `judge_pairs` scores any.

        Raises:
            ValueError: a prompt is none of the pairs', or belongs to several, so that nobody can tell which
                instruction is asked about.
        """
        pairs = []
        for prompt in prompts:
            candidates = self._by_prompt.get(_key(prompt), [])
            if len(candidates) != 1:
                raise ValueError(
                    f"The prompt {_key(prompt)[:200]} belongs to {len(candidates)} of the judge's pairs, not to one. "
                    "Use `judge_pairs`, which is told the pair."
                )
            pairs += candidates
        return self.judge_pairs(pairs, completions)

    def judge_pairs(self, pairs: Sequence[PromptPair], completions: Sequence[str]) -> list[JudgeScores]:
        """Scores `completions[i]` by the instructions of `pairs[i]`; coherence against the bare prompt.

        Raises:
            ValueError: a pair the judge was not made with.
        """
        self._check_known(pairs)
        trait_scores = [
            100.0 * self._follows(pair, completion) for pair, completion in zip(pairs, completions, strict=True)
        ]
        if self.coherence is None:
            return [JudgeScores(score, None) for score in trait_scores]
        coherence = self.coherence([pair.prompt for pair in pairs], completions)  # type: ignore[misc]
        return [
            JudgeScores(None if other.failure else score, other.coherence, other.failure)
            for score, other in zip(trait_scores, coherence, strict=True)
        ]

    def followed(self, pairs: Sequence[PromptPair], completions: Sequence[str]) -> list[Followed]:
        """Strict and loose verdicts on `completions[i]` by the instructions of `pairs[i]`; asks no other judge.

        Raises:
            ValueError: a pair the judge was not made with.
        """
        self._check_known(pairs)
        return [
            Followed(self._follows(pair, completion), _follows_loosely(pair, completion))
            for pair, completion in zip(pairs, completions, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """The checkers' package and version, and the judge of coherence, as JSON."""
        describe = getattr(self.coherence, "describe", None)
        return {
            "judge": "ifeval",
            "checkers": f"lm-eval {version('lm-eval')}",
            "language_detection": f"langdetect {version('langdetect')}, seed 0",
            "coherence": describe() if describe else type(self.coherence).__name__ if self.coherence else None,
        }

    @property
    def usage(self) -> Mapping[str, int]:
        """Calls and tokens of the judge of coherence, where it counts them."""
        return getattr(self.coherence, "usage", {})

    def _check_known(self, pairs: Sequence[PromptPair]) -> None:
        unknown = [pair.id for pair in pairs if pair.id not in self._checkers]
        if unknown:
            raise ValueError(f"The judge was not made with the pair {unknown[0]!r}; give it all pairs at the start.")

    def _follows(self, pair: PromptPair, completion: str) -> bool:
        return bool(completion.strip()) and all(
            checker.check_following(completion) for checker in self._checkers[pair.id]
        )


def _checked_row(line: str, where: str) -> dict[str, Any]:
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an IFEval prompt is an object, got {type(row).__name__}.")
    for name in ("prompt", "prompt_without_instruction"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where}: {name} must be text that is not empty, got {row.get(name)!r}.")
        check_unicode(row[name], f"{where}: {name}")
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"{where}: instruction_id_list must be a list of instruction ids, got {ids!r}.")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(k, dict) for k in kwargs):
        raise ValueError(f"{where}: kwargs must be a list of {len(ids)} objects, one an instruction, got {kwargs!r}.")
    return row


def _instruction_ids(pair: PromptPair) -> list[str]:
    try:
        return pair.metadata["instruction_id_list"]
    except KeyError:
        raise ValueError(f"The pair {pair.id!r} is not of IFEval: its metadata has no instruction_id_list.") from None


def _load_checkers(ids: set[str]) -> Mapping[str, Any]:
    """{instruction id: checker class} for all of lm-eval, checked for `ids`."""
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise ImportError(_NOT_INSTALLED) from error
    try:
        nltk.data.find(_PUNKT)
    except LookupError as error:
        if needing := sorted(ids & set(_NEED_PUNKT)):
            raise FileNotFoundError(
                f"{', '.join(needing)} needs NLTK's data punkt_tab, which is not on this machine. Run `python -m "
                "nltk.downloader punkt_tab`, or set NLTK_DATA to a folder that has it."
            ) from error
    try:
        # its import downloads punkt_tab, needed or not, but not on another rank than 0
        with mock.patch.dict(os.environ, {"LOCAL_RANK": "1"}):
            from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise ImportError(_NOT_INSTALLED) from error
    langdetect.DetectorFactory.seed = 0  # it guesses at random otherwise
    unknown = sorted(ids - set(INSTRUCTION_DICT))
    if unknown:
        raise ValueError(f"No checker for {', '.join(unknown)}. There are: {', '.join(sorted(INSTRUCTION_DICT))}.")
    return INSTRUCTION_DICT


def _build_checkers(pair: PromptPair, classes: Mapping[str, Any]) -> list[Any]:
    checkers = []
    for name, given in zip(_instruction_ids(pair), pair.metadata["kwargs"], strict=True):
        checker = classes[name](name)
        # as lm-eval does: what is 0 or empty counts as not given
        arguments = {key: value for key, value in given.items() if value}
        wanted = set(checker.get_instruction_args_keys())
        # a checker makes up at random what it is not given
        if set(arguments) != wanted:
            raise ValueError(
                f"{pair.id}: kwargs of {name} must be {', '.join(sorted(wanted)) or 'empty'}, got {given!r}."
            )
        try:
            checker.build_description(**arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{pair.id}: {name} can't take {arguments!r}: {error}") from error
        checkers.append(checker)
    return checkers


def _follows_loosely(pair: PromptPair, completion: str) -> bool:
    from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_loose

    ids, kwargs = _instruction_ids(pair), pair.metadata["kwargs"]
    example = InputExample(key=0, instruction_id_list=ids, prompt="", kwargs=kwargs)  # no checker reads the prompt
    return test_instruction_following_loose(example, completion).follow_all_instructions


def _key(prompt: Any) -> str:
    return json.dumps(prompt, ensure_ascii=False)
