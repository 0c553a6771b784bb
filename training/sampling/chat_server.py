"""Requests to an OpenAI-compatible server: many in flight, retried where that makes sense, every mishap counted.

vLLM, SGLang, TGI, llama.cpp, `transformers serve` and OpenAI itself speak this protocol. Retries are made here, not in
the `openai` client, so that each one is counted. The API key is read from the environment when a connection is opened
and kept nowhere else.
"""

import asyncio
import ipaddress
import logging
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from peft_psr.prompts.conversations import Prompt
from peft_psr.training.data.draws import Failure

from .server_replies import Mishap, ServerAnswer, read_answer, read_error
from .server_settings import LearntSettings


logger = logging.getLogger(__name__)

Tag = TypeVar("Tag")

LONGEST_WAIT = 600.0
"""Seconds; a server that asks for a longer pause than this has failed the request."""
LONGEST_BACKOFF = 60.0
"""Seconds between two attempts where the server asks for no pause."""
REFUSALS_TO_STOP = 3
"""With so many requests refused as malformed and none answered, the settings are wrong and not one prompt."""
UNREADABLE = (openai.OpenAIError, ValueError, TypeError, AttributeError)
"""What the `openai` client raises, on answers that are not JSON too."""


class ServerError(RuntimeError):
    """The server refuses the requests for good, e.g. for a wrong key or an unknown model; retrying is no use."""


class TooManyFailures(RuntimeError):
    """More requests failed after all retries than `max_failure_share` allows.

    Attributes:
        counts: What happened to the requests so far; see `ChatServer`.
    """

    def __init__(self, message: str, counts: Mapping[str, int]):
        super().__init__(message)
        self.counts = dict(counts)


@dataclass(frozen=True)
class Request:
    """One request."""

    prompt: Prompt  # messages go to `/chat/completions`; plain text goes to `/completions`, without a chat template
    # by the API's names: `seed`, `temperature`, `max_tokens`,
    parameters: Mapping[str, Any] = field(default_factory=dict)
    # how many of the likeliest tokens to ask for in each place of the answer, 0 for none. For messages only
    top_logprobs: int = 0


class ChatServer:
    """A model on an OpenAI-compatible server.

    Attributes:
        counts: `requests` sent, every attempt; `answered`; `retried`; `failed`, given up after all retries; and of the
            attempts: `timeout`, `connection` (refused or cut), `rate_limited` (429), `server_error` (5xx, 408, 409,
            425), `malformed` (no JSON, or of another shape), `empty_choices`, `refused` (400, 413, 422 and the like),
            `denied` (401, 403), `not_found` (404), `no_credit`; `adapted`, refused for a setting and sent again with
            what the server takes; and `no_logprobs`, asked for in vain.
        usage: `calls` (answered requests), `prompt_tokens` and `completion_tokens` as the server counts them.
        seen: `models` and `system_fingerprints` that the server named in its answers.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        timeout: float = 120.0,
        max_retries: int = 6,
        backoff: float = 1.0,
        max_failure_share: float = 0.1,
        min_requests: int = 20,
        extra_body: Mapping[str, Any] | None = None,
    ):
        """Nothing is sent yet.

        Args:
            base_url: E.g. `"http://localhost:8000/v1"`.
            model: Its name on the server.
            api_key_variable: Environment variable with the API key; unset or empty for a server that asks for none.
            concurrency: Requests in flight at once.
            timeout: Seconds without a sign of life after which an attempt is given up.
            max_retries: Attempts after the first.
            backoff: Seconds before the first retry; doubled for each further one, up to a minute, times a random
                factor between 1/2 and 1. A server's Retry-After is waited for in full, by all requests.
            max_failure_share: 0-1; `TooManyFailures` once more than this share of the finished requests has failed.
            min_requests: Requests that must have finished before that share counts.
            extra_body: Fields of this server's own, sent with each request, e.g.
                `{"chat_template_kwargs": {"enable_thinking": False}}` or `{"top_k": -1}`.

        Raises:
            ValueError: a URL without a host, or with a user name, password or query in it; an empty model name; a
                number out of its range.
        """
        self.host = _checked_host(base_url, api_key_variable)
        if not model:
            raise ValueError("model must be the model's name on the server, got an empty one.")
        for name, value, least in [
            ("concurrency", concurrency, 1),
            ("max_retries", max_retries, 0),
            ("backoff", backoff, 0),
            ("min_requests", min_requests, 1),
        ]:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}.")
        if not 0 <= max_failure_share <= 1:
            raise ValueError(f"max_failure_share must be between 0 and 1, got {max_failure_share}.")
        self.base_url, self.model, self.api_key_variable = base_url, model, api_key_variable
        self.concurrency, self.timeout, self.max_retries, self.backoff = concurrency, timeout, max_retries, backoff
        self.max_failure_share, self.min_requests = max_failure_share, min_requests
        self.extra_body = dict(extra_body or {})
        self.counts: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()
        self.seen: dict[str, set[str]] = {"models": set(), "system_fingerprints": set()}
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._learnt = LearntSettings(self.host)
        self._last_failure = ""
        self._jitter = random.Random()

    def top_logprobs(self, wanted: int) -> int:
        """How many of the likeliest tokens the server is asked for where so many are wanted, as far as is known."""
        return self._learnt.top_logprobs(wanted)

    def describe(self) -> dict[str, Any]:
        """What is asked, as JSON; under `seen`, what the server said of itself in its answers so far."""
        return {
            "host": self.host,
            "model": self.model,
            "extra_body": self.extra_body,
            "seen": {name: sorted(values) for name, values in self.seen.items()},
        }

    def models(self) -> list[str]:
        """The models that the server lists; `transformers serve` lists its cache, not all that it can load.

        Raises `ServerError` if the server does not answer, or refuses.
        """
        with self._client(openai.OpenAI) as client:
            try:
                return [entry.id for entry in client.models.list()]
            except UNREADABLE as error:
                mishap = self._scrubbed(read_error(error))
        raise ServerError(f"The server at {self.host} does not list its models: {mishap.text}")

    def stream(self, requests: Iterable[tuple[Tag, Request]]) -> Generator[tuple[Tag, ServerAnswer | Failure]]:
        """Send requests, and yield each one's tag and outcome as it finishes, in any order.

        At most `concurrency` are in flight, and no more than as many again wait for the caller to take them; they are
        taken
        from another thread, as there is room. Closing the iterator cancels what is in flight.

        Raises:
            ServerError: the server refuses for good: a wrong key (401), no access (403), an unknown model or path
                (404), no credit left, or the first `REFUSALS_TO_STOP` requests refused as malformed.
            TooManyFailures: see `max_failure_share`. All that finished before has been yielded.
        """
        outbox: queue.SimpleQueue = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        room = asyncio.Semaphore(2 * self.concurrency)
        work = loop.create_task(self._send_all(iter(requests), outbox, room))

        def run() -> None:
            error: BaseException | None = None
            try:
                try:
                    loop.run_until_complete(work)
                finally:
                    loop.run_until_complete(loop.shutdown_default_executor())
            except BaseException as problem:
                error = problem
            outbox.put((None, error))

        thread = threading.Thread(target=run, name=f"requests to {self.host}", daemon=True)
        thread.start()
        try:
            while True:
                item, error = outbox.get()
                if error is not None:
                    raise error
                if item is None:
                    return
                loop.call_soon_threadsafe(room.release)
                yield item
        finally:
            loop.call_soon_threadsafe(work.cancel)
            thread.join()
            loop.close()

    async def _send_all(self, requests: Iterator, outbox: queue.SimpleQueue, room: asyncio.Semaphore) -> None:
        async with self._client(openai.AsyncOpenAI) as client:
            workers = [
                asyncio.create_task(self._send_some(client, requests, outbox, room)) for _ in range(self.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _send_some(
        self, client: Any, requests: Iterator, outbox: queue.SimpleQueue, room: asyncio.Semaphore
    ) -> None:
        while True:
            await room.acquire()
            entry = next(requests, None)
            if entry is None:
                room.release()
                return
            tag, request = entry
            outcome = await self._send(client, request)
            outbox.put(((tag, outcome), None))
            self._check_failures()

    async def _send(self, client: Any, request: Request) -> ServerAnswer | Failure:
        # every attempt of one request
        attempt = 0
        while True:
            sent = self._parameters(request)
            outcome = await self._attempt(client, request, sent)
            if isinstance(outcome, ServerAnswer):
                self._account(request, outcome)
                return outcome
            if outcome.kind == "refused" and self._learnt.learn(sent, outcome.text):
                self._count("adapted")
                continue
            self._count(outcome.kind)
            hopeless = self.counts["refused"] >= REFUSALS_TO_STOP and not self.counts["answered"]
            if outcome.action == "stop" or hopeless:
                raise ServerError(await self._explain(client, outcome))
            if outcome.action == "fail" or attempt == self.max_retries or (outcome.wait or 0) > LONGEST_WAIT:
                self._count("failed")
                self._last_failure = outcome.text
                return Failure(outcome.text)
            self._count("retried")
            pause = min(self.backoff * 2**attempt, LONGEST_BACKOFF) * self._jitter.uniform(0.5, 1.0)
            attempt += 1
            if outcome.wait is not None:
                logger.info("The server at %s asks for a pause of %.1f s.", self.host, outcome.wait)
                self._quiet_until = max(self._quiet_until, time.monotonic() + outcome.wait)
            await asyncio.sleep(pause)

    def _parameters(self, request: Request) -> dict[str, Any]:
        prompt = request.prompt
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        more = self._learnt.parameters(request.parameters, request.top_logprobs, chat="messages" in asked)
        return {"model": self.model, "extra_body": self.extra_body, **asked, **more}

    async def _attempt(self, client: Any, request: Request, parameters: Mapping[str, Any]) -> ServerAnswer | Mishap:
        while (wait := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._count("requests")
        # The mishap is returned, not raised: an error raised here would have the client's behind it, which holds the
        # request's headers and with them the key.
        try:
            if isinstance(request.prompt, str):
                response = await client.completions.create(**parameters)
                answer = read_answer(response, lambda choice: choice.text)
            else:
                response = await client.chat.completions.create(**parameters)
                answer = read_answer(response, lambda choice: choice.message.content)
        except (openai.OpenAIError, ValueError) as error:
            return self._scrubbed(read_error(error))
        if not isinstance(answer, ServerAnswer):
            return self._scrubbed(answer)
        self._see(response)
        return answer

    def _see(self, response: Any) -> None:
        with self._lock:
            for name, value in (("models", response.model), ("system_fingerprints", response.system_fingerprint)):
                if isinstance(value, str):
                    self.seen[name].add(value)

    def _account(self, request: Request, answer: ServerAnswer) -> None:
        with self._lock:
            self.counts["answered"] += 1
            self.usage["calls"] += 1
            self.usage["prompt_tokens"] += answer.prompt_tokens or 0
            self.usage["completion_tokens"] += answer.completion_tokens or 0
            if request.top_logprobs and answer.tokens is None:
                self.counts["no_logprobs"] += 1

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def _check_failures(self) -> None:
        with self._lock:
            counts = Counter(self.counts)
        finished = counts["answered"] + counts["failed"]
        if finished >= self.min_requests and counts["failed"] > self.max_failure_share * finished:
            listed = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
            raise TooManyFailures(
                f"{counts['failed']} of {finished} requests to {self.host} failed after up to {self.max_retries} "
                f"retries each, more than max_failure_share = {self.max_failure_share:g} allows ({listed}). "
                f"The last one: {self._last_failure}. What finished before is kept; start again when the server is "
                "well.",
                counts,
            )

    async def _explain(self, client: Any, mishap: Mishap) -> str:
        if mishap.kind == "denied":
            state = "was sent" if self._key() else "is not set"
            return (
                f"The server at {self.host} answers {mishap.text}. The key in the environment variable "
                f"{self.api_key_variable} {state}."
            )
        try:
            names = [entry.id async for entry in client.models.list()]
        except UNREADABLE:
            names = []
        listed = f" It lists {', '.join(names[:20])}." if names and self.model not in names else ""
        hint = "" if self.base_url.rstrip("/").endswith("/v1") else " base_url usually ends in /v1."
        return f"The server at {self.host} refuses requests for the model {self.model!r}: {mishap.text}.{listed}{hint}"

    def _client(self, kind: Any) -> Any:
        http: dict[str, Any] = {}
        if _is_loopback(urlsplit(self.base_url).hostname or ""):  # a proxy would look for it on its own machine
            own = openai.DefaultAsyncHttpxClient if kind is openai.AsyncOpenAI else openai.DefaultHttpxClient
            http["http_client"] = own(trust_env=False, timeout=self.timeout)
        # local servers take any key, but the client insists on one
        return kind(base_url=self.base_url, api_key=self._key() or "none", timeout=self.timeout, max_retries=0, **http)

    def _key(self) -> str:
        # in no local variable, so that no traceback shows it
        if not _is_header_text(os.environ.get(self.api_key_variable, "").strip()):
            raise ValueError(f"The environment variable {self.api_key_variable} holds characters no API key has.")
        return os.environ.get(self.api_key_variable, "").strip()

    def _scrubbed(self, mishap: Mishap) -> Mishap:
        text = mishap.text.replace(self._key() or "\0", "***")
        return replace(mishap, text=text if len(text) <= 500 else text[:500] + " ...")


def _is_header_text(value: str) -> bool:
    return value.isascii() and value.isprintable()


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _checked_host(base_url: str, api_key_variable: str) -> str:
    parts = urlsplit(base_url)
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"base_url of {parts.hostname} holds a user name, password or query, which would end in logs. Give the "
            f"bare URL and put the key into the environment variable {api_key_variable}."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must look like http://localhost:8000/v1, got {base_url!r}.")
    return parts.netloc
