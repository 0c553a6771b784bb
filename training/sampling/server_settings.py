"""What a server takes, learnt from its refusals: the name of the token limit, how many log-probabilities it gives.

OpenAI's newer models refuse `max_tokens` and want `max_completion_tokens`, other servers know the first alone; many
give 5 of the likeliest tokens and not 20, some none. A refusal says so once, and all further requests follow.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any


logger = logging.getLogger(__name__)

LIMITS = ("max_tokens", "max_completion_tokens")
USUAL_LOGPROBS = 5
"""What servers give that do not give 20, to ask for where a refusal names no number."""

_UNKNOWN = re.compile(
    r"unsupported|not supported|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|deprecated|instead"
)
_TOO_MANY = re.compile(r"top_logprobs|max|most|less|greater|between|exceed|range|<=|≤")


class LearntSettings:
    """What requests to a server (`host`, in the log) follow; for several threads: answers of any order may teach."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._limit: str | None = None
        self._top_logprobs: int | None = None

    def top_logprobs(self, wanted: int) -> int:
        """How many of the likeliest tokens to ask for, of those that are wanted; 0 for none."""
        return wanted if self._top_logprobs is None else min(wanted, self._top_logprobs)

    def parameters(self, given: Mapping[str, Any], top_logprobs: int, chat: bool) -> dict[str, Any]:
        """A request's parameters as this server takes them; the older `/completions` knows `max_tokens` alone."""
        sent = dict(given)
        if chat and self._limit is not None:
            for name in LIMITS:
                if name in sent:
                    sent[self._limit] = sent.pop(name)
        if chat and (count := self.top_logprobs(top_logprobs)):
            sent |= {"logprobs": True, "top_logprobs": count}
        return sent

    def learn(self, sent: Mapping[str, Any], refusal: str) -> bool:
        """Take what a refusal says of what was sent; returns whether the request is worth another attempt now."""
        words = refusal.lower()
        if (count := sent.get("top_logprobs", 0)) and "logprob" in words:
            if self.top_logprobs(count) == count:
                self._top_logprobs = _fewer(count, words)
                told = f"at most {self._top_logprobs}" if self._top_logprobs else "none"
                logger.warning("The server at %s gives %s of the likeliest tokens, not %d.", self.host, told, count)
            return True
        name = next((name for name in LIMITS if name in sent), None)
        # a limit that is too large is named in other words
        if name and "messages" in sent and re.search(rf"\b{name}\b", words) and _UNKNOWN.search(words):
            if self._limit is None:
                self._limit = LIMITS[1 - LIMITS.index(name)]
                logger.info("The server at %s wants %s in place of %s.", self.host, self._limit, name)
            return self._limit != name
        return False


def _fewer(count: int, words: str) -> int:
    """How many log-probabilities a refusal of `count` leaves; fewer, so that asking comes to an end."""
    if not _TOO_MANY.search(words):
        return 0
    named = [int(number) for number in re.findall(r"\b[0-9]+\b", words)]
    usual = USUAL_LOGPROBS if count > USUAL_LOGPROBS else 0
    return max((number for number in named if 0 < number < count), default=usual)
