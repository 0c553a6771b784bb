"""Completions drawn from a model on an OpenAI-compatible server; a `Sampler`."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from peft_psr.prompts.conversations import begins_answer
from peft_psr.training.data.draws import Completion, Draw, Failure, check_sampling

from .chat_server import ChatServer, Request
from .server_replies import ServerAnswer


CUT_OFF = ("length", "content_filter")
"""Words of servers for an answer that did not end by itself."""


class ServerSampler:
    """Draws completions from a server; conversations with its chat template, plain texts without.

    `transformers serve` samples only where the model's `generation_config.json` says `do_sample`, whatever temperature
    it is asked for, and sets a request's seed for all that it draws: there, only one request in flight is
    reproducible.

    Args:
        server: The model to draw from.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the sampling, with top-p 1; 0 takes the likeliest token. Other limits on what is sampled, such
            as top-k, are the server's; set them by its `extra_body`.

    Raises:
        ValueError: `max_new_tokens` below 1, or temperature below 0.
    """

    def __init__(self, server: ChatServer, max_new_tokens: int = 256, temperature: float = 1.0):
        check_sampling(max_new_tokens, temperature)
        self.server, self.max_new_tokens, self.temperature = server, max_new_tokens, temperature

    def describe(self) -> dict[str, Any]:
        """See `Sampler.describe`."""
        return {
            "engine": "OpenAI-compatible server",
            **self.server.describe(),
            "revision": None,
            "template_hash": None,
            "template_args": self.server.extra_body.get("chat_template_kwargs") or None,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "not_reproducible": "The same seeds give the same requests. The same text only where the server honours "
            "`seed` for each request; with continuous batching, rounding depends on what else is in the batch. The "
            "server tells neither the revision of its model nor its chat template, and may have a top-k of its own.",
        }

    def __call__(self, draws: Sequence[Draw]) -> Iterator[tuple[Draw, Completion | Failure]]:
        """Yield each draw with its outcome as it finishes; closing the iterator cancels what is in flight.

        Raises:
            ServerError, TooManyFailures: as `ChatServer.stream`.
            ValueError: a prompt ends with the beginning of the answer, which a server takes for a turn that has ended.
        """
        goes_on = self.server.extra_body.get("continue_final_message")
        begun = None if goes_on else next((draw for draw in draws if begins_answer(draw.prompt)), None)
        if begun is not None:
            raise ValueError(
                f"The prompt of {begun.id} ends with an assistant's turn, which the server would answer with another "
                "one. Draw from the model here (sampler: local), or, if the server is vLLM, say "
                '--server-fields \'{"continue_final_message": true, "add_generation_prompt": false}\'.'
            )
        settings = {"temperature": self.temperature, "top_p": 1.0, "max_tokens": self.max_new_tokens}
        requests = ((draw, Request(draw.prompt, {"seed": draw.seed, **settings})) for draw in draws)
        with closing(self.server.stream(requests)) as outcomes:
            for draw, outcome in outcomes:
                yield draw, _completion(outcome) if isinstance(outcome, ServerAnswer) else outcome


def _completion(answer: ServerAnswer) -> Completion:
    return Completion(
        text=answer.text,
        truncated=answer.finish_reason in CUT_OFF,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        reasoned=answer.reasoned,
    )
