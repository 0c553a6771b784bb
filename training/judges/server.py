"""A language model on an OpenAI-compatible server as a judge, scored as `answer_score` says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

from peft_psr.prompts.reasoning import split_reasoning
from peft_psr.training.data.draws import Failure, Sampler
from peft_psr.training.sampling.chat_server import ChatServer, Request
from peft_psr.training.sampling.server import ServerSampler
from peft_psr.training.sampling.server_replies import ServerAnswer

from .answer_cache import AnswerCache
from .answer_score import TOP_TOKENS, Scored, score_answer
from .language_model import LLMJudge
from .prompts import COHERENCE_PROMPT, TRAIT_PROMPT
from .settings import JudgeSettings


logger = logging.getLogger(__name__)

ANSWER_TOKENS = 16
"""Enough for a number and a few words around it, for servers without log-probabilities."""
TOKENS_KEPT = 4
"""Places whose log-probabilities go into the cache: a blank, a number, what follows it."""


class ServerJudge(LLMJudge):
    """A judge on a server.

    Args:
        server: The judging model.
        trait, trait_prompt, coherence_prompt, cache: As for every `LLMJudge`.
    """

    at_server: ClassVar[bool] = True

    def __init__(
        self,
        server: ChatServer,
        trait: str = "",
        trait_prompt: str = TRAIT_PROMPT,
        coherence_prompt: str = COHERENCE_PROMPT,
        cache: AnswerCache | None = None,
    ) -> None:
        super().__init__(trait, trait_prompt, coherence_prompt, cache)
        self.server = server
        self.identity = {"model": server.model, "extra_body": server.extra_body}
        self.parameters = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS, "top_logprobs": TOP_TOKENS}
        self._warned: set[str] = set()

    @classmethod
    def connect(cls, given: JudgeSettings) -> Callable[..., ServerJudge]:
        """See `LLMJudge.connect`; all judges share the server's counts."""
        return partial(cls, given.server())

    @classmethod
    def sampler(cls, given: JudgeSettings, max_new_tokens: int) -> Sampler:
        """See `LLMJudge.sampler`."""
        return ServerSampler(given.server(), max_new_tokens, temperature=0.0)

    def _description(self) -> dict[str, Any]:
        return {
            "engine": "OpenAI-compatible server",
            **self.server.describe(),
            **self.parameters,
            "top_logprobs": self.server.top_logprobs(TOP_TOKENS),
        }

    def _ask(self, texts: list[str]) -> Generator[dict[str, dict[str, Any] | Failure]]:
        parameters = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS}
        requests = (
            (text, Request([{"role": "user", "content": text}], parameters, top_logprobs=TOP_TOKENS)) for text in texts
        )
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

    def _read(self, reply: dict[str, Any]) -> Scored:
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
