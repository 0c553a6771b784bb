"""IFEval's published checkers as a judge.

The checkers are those of EleutherAI's lm-eval (extra `ifeval`), which keeps Google's code (Zhou et al., arXiv
2311.07911). "Strict" and "loose" as there: every instruction of a prompt must be followed, and an empty completion
follows none; loosely, each may be followed by what is left without first line, last line or asterisks.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any, ClassVar, NamedTuple
from unittest import mock

from peft_psr.prompts.conversations import Prompt
from peft_psr.training.data.draws import PromptPair

from .base import Judge, JudgeScores, Judging, as_judge
from .registry import JUDGES
from .settings import JudgeSettings


# These split text into sentences or words with NLTK's punkt_tab.
_NEED_PUNKT = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
_PUNKT = "tokenizers/punkt_tab/english/"
_NOT_INSTALLED = 'IFEval\'s checkers are not installed. Install them with `pip install "peft-psr[ifeval]"`.'


class Followed(NamedTuple):
    """Whether a completion follows all instructions of its prompt, by the published checkers."""

    strict: bool  # As it stands
    # in one of the eight published forms: with or without first line, last line and asterisks. An instruction may be
    # followed by another form than the next; what is strict is loose too
    loose: bool


class IFEvalJudge(Judge):
    """Trait score 100 where every instruction of the prompt is followed, 0 where not; coherence from another judge.

    Args:
        pairs: What it may be asked about, as `read_ifeval` gives them.
        coherence: A judge whose coherence score is passed on; without one the coherence score is `None`.

    Raises:
        ImportError: the extra `ifeval` is not installed.
        ValueError: a pair's instruction has no checker, or its `kwargs` are not those the checker takes.
        FileNotFoundError: a checker needs NLTK's punkt_tab, which is not on this machine.
    """

    scores_coherence: ClassVar[bool] = False

    def __init__(self, pairs: Iterable[PromptPair], coherence: Judging | None = None) -> None:
        self.coherence = None if coherence is None else as_judge(coherence)
        self._pairs = {pair.id: pair for pair in pairs}
        ids = {name for pair in self._pairs.values() for name in _instruction_ids(pair)}
        classes = _load_checkers(ids)
        self._checkers = {pair.id: _build_checkers(pair, classes) for pair in self._pairs.values()}
        self._by_prompt: dict[str, list[PromptPair]] = {}
        for pair in self._pairs.values():
            self._by_prompt.setdefault(_key(pair.prompt), []).append(pair)

    @classmethod
    def maker(cls, given: JudgeSettings) -> Callable[[str], Judge]:
        """See `Judge.maker`; all traits have the same judge."""
        make_coherence = JUDGES[given.coherence_judge].maker(given) if given.coherence_judge else None
        cls(given.pairs)  # what has no checker shows

        @cache
        def judge() -> IFEvalJudge:
            return cls(given.pairs, make_coherence("") if make_coherence else None)

        return lambda trait: judge()

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], pairs: Sequence[PromptPair] | None = None
    ) -> list[JudgeScores]:
        """See `Judge.score`; without `pairs`, each prompt must belong to one of the judge's pairs alone.

        Raises:
            ValueError: a pair the judge was not made with; or a prompt of none of its pairs, or of several.
        """
        asked = [self._only_pair(prompt) for prompt in prompts] if pairs is None else pairs
        self._check_known(asked)
        trait_scores = [
            100.0 * self._follows(pair, completion) for pair, completion in zip(asked, completions, strict=True)
        ]
        if self.coherence is None:
            return [JudgeScores(score, None) for score in trait_scores]
        coherence = self.coherence.score(prompts, completions, asked)
        return [
            JudgeScores(None if other.failure else score, other.coherence, other.failure)
            for score, other in zip(trait_scores, coherence, strict=True)
        ]

    def _only_pair(self, prompt: Prompt) -> PromptPair:
        candidates = self._by_prompt.get(_key(prompt), [])
        if len(candidates) != 1:
            raise ValueError(
                f"The prompt {_key(prompt)[:200]} belongs to {len(candidates)} of the judge's pairs, not to one. Give "
                "`score` the pairs too."
            )
        return candidates[0]

    def followed(self, pairs: Sequence[PromptPair], completions: Sequence[str]) -> list[Followed]:
        """Strict and loose verdicts on `completions[i]` by the instructions of `pairs[i]`, which it must know."""
        self._check_known(pairs)
        return [
            Followed(self._follows(pair, completion), _follows_loosely(pair, completion))
            for pair, completion in zip(pairs, completions, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """The checkers' package and version, and the judge of coherence, as JSON."""
        return {
            "judge": "ifeval",
            "checkers": f"lm-eval {version('lm-eval')}",
            "language_detection": f"langdetect {version('langdetect')}, seed 0",
            "coherence": self.coherence.describe() if self.coherence else None,
        }

    @cached_property
    def usage(self) -> Counter[str]:
        """That of the judge of coherence."""
        return self.coherence.usage if self.coherence else Counter()

    def _check_known(self, pairs: Sequence[PromptPair]) -> None:
        unknown = [pair.id for pair in pairs if pair.id not in self._checkers]
        if unknown:
            raise ValueError(f"The judge was not made with the pair {unknown[0]!r}; give it all pairs at the start.")

    def _follows(self, pair: PromptPair, completion: str) -> bool:
        return bool(completion.strip()) and all(
            checker.check_following(completion) for checker in self._checkers[pair.id]
        )


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
