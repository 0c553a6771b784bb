"""A language model as a judge: each completion is graded twice, for the trait and for coherence.

`ServerJudge` asks an OpenAI-compatible server, `LocalJudge` (in `local_judge`) a transformers model. Answers are
cached by what was asked, so that a rerun asks nothing.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from peft_psr.prompts.conversations import Prompt, prompt_text
from peft_psr.prompts.reasoning import split_reasoning
from peft_psr.training.data.draws import Failure
from peft_psr.training.sampling.chat_server import ChatServer, Request
from peft_psr.training.sampling.server_replies import ServerAnswer

from .answer_cache import AnswerCache, answer_key
from .answer_score import TOP_TOKENS, Scored, score_answer
from .base import JudgeScores
from .prompts import COHERENCE_PROMPT, TRAIT_PROMPT


logger = logging.getLogger(__name__)

ANSWER_TOKENS = 16
"""Enough for a number and a few words around it, for servers without log-probabilities."""
TOKENS_KEPT = 4
"""Places whose log-probabilities go into the cache: a blank, a number, what follows it."""


def fill_prompt(template: str, **values: str) -> str:
    """Put `values` for their names in braces; other braces, also those in the values, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


class LLMJudge(ABC):
    """Grades completions with a language model; a `peft_psr.training.judges.base.Judge`.

    Attributes:
        usage: `calls` (questions put to the model), `cached` (answers found in the cache), `prompt_tokens` and
            `completion_tokens`.
    """

    def __init__(self, trait: str, trait_prompt: str, coherence_prompt: str, cache: AnswerCache | None):
        """See `ServerJudge` and `LocalJudge`."""
        for name, template in {"trait_prompt": trait_prompt, "coherence_prompt": coherence_prompt}.items():
            if "{answer}" not in template:
                raise ValueError(f"{name} must hold {{answer}}, where the completion goes; got {template[:80]!r}.")
        if "{trait}" in trait_prompt and not trait:
            raise ValueError("trait_prompt asks for {trait}: give `trait`, a short description of it.")
        self.templates = {
            "trait": fill_prompt(trait_prompt, trait=trait),
            "coherence": coherence_prompt,
        }
        self.cache = cache
        self.usage: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()

    def describe(self) -> dict[str, Any]:
        """The judge as JSON: model, prompts, and under `score` what scores were read from so far.

        `score` is `"log-probabilities"`, `"text"`, the count of each if there were both, or `None` before the first.
        """
        sources = dict(sorted(self._sources.items()))
        return {
            **self._description(),
            "trait_prompt": self.templates["trait"],
            "coherence_prompt": self.templates["coherence"],
            "score": sources if len(sources) > 1 else next(iter(sources), None),
        }

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[JudgeScores]:
        """Score `completions[i]` as an answer to `prompts[i]`.

        Answers go to the cache as they come, so that what was asked is not lost if the run stops.

        Raises:
            ValueError: there are not as many completions as prompts.
            ServerError: the server refuses for good.
            TooManyFailures: the share of failures passed the server's limit.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one for each.")
        asked = [
            tuple(fill_prompt(self.templates[name], question=prompt_text(prompt), answer=completion)
                  for name in ("trait", "coherence"))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]  # fmt: skip
        replies = self._replies(list(dict.fromkeys(text for texts in asked for text in texts)))
        return [self._scores(replies[trait], replies[coherence]) for trait, coherence in asked]

    def _replies(self, texts: list[str]) -> dict[str, dict | Failure]:
        keys = {text: answer_key(self._identity(), text, self._parameters()) for text in texts}
        known = self.cache.get(keys.values()) if self.cache else {}
        replies: dict[str, dict | Failure] = {text: known[key] for text, key in keys.items() if key in known}
        self.usage["cached"] += len(replies)
        with closing(self._ask([text for text in texts if text not in replies])) as batches:
            for batch in batches:
                replies |= batch
                if self.cache:
                    self.cache.put({keys[text]: r for text, r in batch.items() if not isinstance(r, Failure)})
        return replies

    def _scores(self, trait: dict | Failure, coherence: dict | Failure) -> JudgeScores:
        if isinstance(trait, Failure):
            return JudgeScores(None, None, f"trait: {trait.reason}")
        if isinstance(coherence, Failure):
            return JudgeScores(None, None, f"coherence: {coherence.reason}")
        scored = [self._read(reply) for reply in (trait, coherence)]
        for _, source in scored:
            self._sources[source] += 1
        return JudgeScores(scored[0].score, scored[1].score)

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """What `describe` says of the model."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What stands for the model in the cache."""

    @abstractmethod
    def _parameters(self) -> dict[str, Any]:
        """How it is asked, for the cache."""

    @abstractmethod
    def _ask(self, texts: list[str]) -> Generator[dict[str, dict | Failure]]:
        """Put each text to the model as a user's turn; yields replies (JSON) by text, some at a time."""

    @abstractmethod
    def _read(self, reply: dict) -> Scored:
        """The score in a reply."""


class ServerJudge(LLMJudge):
    """A judge on an OpenAI-compatible server, scored as `answer_score` says."""

    def __init__(
        self,
        server: ChatServer,
        trait: str = "",
        trait_prompt: str = TRAIT_PROMPT,
        coherence_prompt: str = COHERENCE_PROMPT,
        cache: AnswerCache | None = None,
    ):
        """Nothing is sent yet.

        Args:
            server: The judging model.
            trait: A short description, put for `{trait}`; may be empty if the prompt does not ask for it.
            trait_prompt: Asks for a number 0-100; `{question}` and `{answer}` are filled in.
            coherence_prompt: The same for coherence.
            cache: Where answers are kept; without one, a run that stops loses those of the present call.

        Raises:
            ValueError: a prompt without `{answer}`, or `{trait}` in it and no trait given.
        """
        super().__init__(trait, trait_prompt, coherence_prompt, cache)
        self.server = server
        self._warned: set[str] = set()

    def _description(self) -> dict[str, Any]:
        return {"engine": "OpenAI-compatible server", **self.server.describe(), **self._parameters(),
                "top_logprobs": self.server.top_logprobs(TOP_TOKENS)}  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        return {"model": self.server.model, "extra_body": self.server.extra_body}

    def _parameters(self) -> dict[str, Any]:
        return {"temperature": 0.0, "max_tokens": ANSWER_TOKENS, "top_logprobs": TOP_TOKENS}

    def _ask(self, texts: list[str]) -> Generator[dict[str, dict | Failure]]:
        parameters = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS}
        requests = (
            (text, Request([{"role": "user", "content": text}], parameters, top_logprobs=TOP_TOKENS)) for text in texts
        )
        if not texts:
            return
        with closing(self.server.stream(requests)) as outcomes:
            for text, outcome in outcomes:
                if isinstance(outcome, Failure):
                    yield {text: outcome}
                    continue
                self.usage["calls"] += 1
                self.usage["prompt_tokens"] += outcome.prompt_tokens or 0
                self.usage["completion_tokens"] += outcome.completion_tokens or 0
                reply = asdict(outcome)
                reply["tokens"] = outcome.tokens and outcome.tokens[:TOKENS_KEPT]
                yield {text: reply}

    def _read(self, reply: dict) -> Scored:
        answer = ServerAnswer(**reply)
        scored = score_answer(answer)
        if answer.finish_reason == "length" and not (split_reasoning(answer.text).answer or "").strip():
            self._warn(
                f"thinks before it answers, and its {ANSWER_TOKENS} tokens do not reach the answer: no score. Switch "
                "its reasoning off by judge_fields (extra_body), such as "
                '{"chat_template_kwargs": {"enable_thinking": false}}'
            )
        elif scored.source == "text":
            several = "seems to split numbers into several tokens, or to reason before it answers"
            why = several if answer.tokens else "gives no log-probabilities"
            self._warn(f"{why}: scores are the numbers in its answers, not weighted by probability")
        return scored

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("The judge %s at %s %s.", self.server.model, self.server.host, what)
