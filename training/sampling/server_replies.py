"""What came back from an OpenAI-compatible server: an answer, or a mishap and whether trying again makes sense.

Servers differ and the `openai` client does not check what they send, so every field is read with care.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import openai

from peft_psr.files import without_half_pairs


TopTokens = list[tuple[str, float]]
"""The likeliest tokens in one place, as text, with their natural log-probabilities."""


@dataclass(frozen=True)
class ServerAnswer:
    """What the server answered."""

    # the completion, without reasoning that the server keeps apart, and without halves of characters; empty where the
    # server gives none (a model that only thought, or ended at once)
    text: str
    finish_reason: str | None  # the server's word: `"stop"`, `"length"`,
    # the text of each token of the answer with the likeliest tokens in its place, or `None` where the server gives no
    # log-probabilities
    tokens: list[tuple[str, TopTokens]] | None = None
    prompt_tokens: int | None = None  # As the server counts them, or `None`
    completion_tokens: int | None = None  # As the server counts them, or `None`
    reasoned: bool = False  # the server keeps reasoning apart, which is no part of the text


@dataclass(frozen=True)
class Mishap:
    """An attempt that brought no answer."""

    kind: str  # for counting; see `ChatServer.counts`
    text: str  # what happened, with the server's words
    action: Literal["retry", "fail", "stop"] = "retry"  # try again, give this request up, or stop sending altogether
    wait: float | None = None  # seconds that the server asks for before the next attempt


def read_answer(response: Any, text_of: Callable[[Any], Any]) -> ServerAnswer | Mishap:
    """The answer in a response with status 200; `text_of` takes the text out of its first choice.

    Some servers put an error into such a response, as a whole or in its choice.
    """
    try:
        if error := getattr(response, "error", None):
            return _read_error_field(error)
        if not response.choices:
            return Mishap("empty_choices", "the answer has no choices")
        choice = response.choices[0]
        if error := getattr(choice, "error", None):
            return _read_error_field(error)
        text, finish_reason = text_of(choice), choice.finish_reason
    except (AttributeError, TypeError, LookupError) as error:
        return _malformed(error)
    if text is not None and not isinstance(text, str):
        return _malformed(TypeError())
    usage = getattr(response, "usage", None)
    tokens = _tokens(choice)
    return ServerAnswer(
        text=without_half_pairs(text or ""),
        finish_reason=finish_reason,
        tokens=tokens and _of_text(tokens, text or "") if _reasoned(choice) else tokens,
        prompt_tokens=getattr(usage, "prompt_tokens", None),
        completion_tokens=getattr(usage, "completion_tokens", None),
        reasoned=_reasoned(choice),
    )


def _tokens(choice: Any) -> list[tuple[str, TopTokens]] | None:
    try:
        return [
            (
                without_half_pairs(token.token),
                [(without_half_pairs(top.token), float(top.logprob)) for top in token.top_logprobs],
            )
            for token in choice.logprobs.content
        ] or None
    except (AttributeError, TypeError, ValueError):
        return None


def _reasoned(choice: Any) -> bool:
    """Whether the server keeps reasoning apart from the text, under either of its names."""
    message = getattr(choice, "message", None)
    return any(getattr(message, name, None) for name in ("reasoning_content", "reasoning"))


def _of_text(tokens: list[tuple[str, TopTokens]], text: str) -> list[tuple[str, TopTokens]] | None:
    """The tokens of the text, without those of the reasoning before it; `None` where they can't be told apart."""
    if not text.strip():
        return None
    for start in range(len(tokens) - 1, -1, -1):
        rest = "".join(token for token, _ in tokens[start:])
        if rest.lstrip().startswith(text.strip()):
            return tokens[start:]
    return None


def _malformed(error: Exception) -> Mishap:
    return Mishap("malformed", f"the answer is not JSON of the API's shape ({type(error).__name__})")


def read_error(error: Exception) -> Mishap:
    """What an exception of the `openai` client means, or one of reading JSON."""
    if isinstance(error, openai.APITimeoutError):
        return Mishap("timeout", "no answer in time")
    if isinstance(error, openai.APIConnectionError):
        return Mishap("connection", f"the connection failed or was cut ({type(error.__cause__ or error).__name__})")
    if not isinstance(error, openai.APIStatusError):
        return _malformed(error)
    return _by_status(error.status_code, error.code, error.message, retry_after(error.response.headers))


def _read_error_field(error: Any) -> Mishap:
    """What `{"error": ...}` with status 200 means, by the status or the word that it gives as its code."""
    fields = error if isinstance(error, Mapping) else getattr(error, "__dict__", {"message": error})
    said = f"the answer is an error: {fields.get('message') or error}"
    for code in (fields.get("code"), fields.get("status"), fields.get("status_code"), fields.get("type")):
        if (number := str(code)).isdigit() and 400 <= int(number) < 600:
            return _by_status(int(number), None, said, None)
        if code in _STATUS_OF:
            return _by_status(_STATUS_OF[code], code, said, None)
    return Mishap("server_error", said)


_STATUS_OF = {
    "invalid_api_key": 401, "authentication_error": 401, "permission_error": 403, "model_not_found": 404,
    "not_found_error": 404, "insufficient_quota": 429, "rate_limit_exceeded": 429, "rate_limit_error": 429,
    "invalid_request_error": 400, "context_length_exceeded": 400, "unsupported_parameter": 400, "BadRequestError": 400,
    "NotFoundError": 404,
}  # fmt: skip
"""The status that goes with a word of OpenAI's and Anthropic's APIs, or vLLM's."""


def _by_status(status: int, code: Any, said: str, wait: float | None) -> Mishap:
    if status in (401, 403):  # without the server's words, which may quote the key
        return Mishap("denied", f"{status}, the API key is refused or has no access", "stop")
    if status == 404:
        return Mishap("not_found", said, "stop")
    if status == 402 or code == "insufficient_quota":
        return Mishap("no_credit", said, "stop")
    if status == 429:
        return Mishap("rate_limited", said, wait=wait)
    if status >= 500 or status in (408, 409, 425):
        return Mishap("server_error", said, wait=wait)
    return Mishap("refused", said, "fail")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3); `None` without one."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
