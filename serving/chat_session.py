"""A conversation with a model whose adapters are chosen and turned up or down on the way; no terminal here."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer

from peft_psr import PSRConfig, PSRModel
from peft_psr.config import check_strength
from peft_psr.evaluation.inspection.shading import shaded_answer
from peft_psr.positions import encode_chat
from peft_psr.prompts.conversations import pad_id, render_prompt
from peft_psr.prompts.messages import Message
from peft_psr.prompts.reasoning import opens_reasoning, split_reasoning
from peft_psr.prompts.rendering import TemplateRefusal
from peft_psr.training.passes.branches import unedited
from peft_psr.training.sampling.local import own_distribution


BASE = "none"
"""What the base model is called where adapters are named."""


@dataclass(frozen=True)
class ChatAnswer:
    """An answer and what is needed to look at it again.

    Attributes:
        text: What was printed, special tokens and reasoning included.
        ids: (1, answer) int64, without the token that ends the turn.
        prompt: The encoded conversation that it answers.
        alphas: Strength of each adapter that was active.
        cut: Why it stopped short: "interrupted", "max_new_tokens", "context", or `None` where it did not.
        turn: What of it stays in the conversation, as chat templates render an earlier turn: without reasoning and
            blanks around it. `None` where its reasoning was cut off: neither question nor answer stay.
    """

    text: str
    ids: torch.Tensor
    prompt: dict[str, torch.Tensor]
    alphas: dict[str, float]
    cut: str | None
    turn: str | None


class ChatSession:
    """A conversation, and the adapters that steer it; at the start the one that was loaded first.

    Before each answer the whole conversation is encoded anew. Earlier answers get edits on the very tokens they were
    generated with, by the adapters and at the strengths of now.

    Args:
        model: A model with PSR adapters.
        processing_class: Its tokenizer, with a chat template.
        system: Text of the system turn, or empty for none.
        max_new_tokens: Longest answer, in tokens.
        temperature: Of the sampling; 0 takes the likeliest token, `None` leaves the model's own settings.
        seed: Same seed, same conversation: same answer, so that what differs is the adapters' doing.

    Raises:
        ValueError: `max_new_tokens` below 1, a negative temperature, or a chat template that is missing or refuses
            the system turn.
    """

    def __init__(
        self,
        model: PeftModel,
        processing_class: PreTrainedTokenizerBase,
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if temperature is not None and not temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {temperature}.")
        self.model, self.processing_class = model, processing_class
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.messages: list[Message] = []
        self.last: ChatAnswer | None = None
        self.set_system(system)
        self.use([self.names[0]])

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self.model.peft_config)

    @property
    def active(self) -> list[str]:
        """Names of the adapters that steer the next answer; none for the base model."""
        return list(self._active)

    def config(self, name: str) -> PSRConfig:
        """An adapter's configuration, with its strength."""
        return cast(PSRConfig, self.model.peft_config[name])

    def use(self, names: Sequence[str]) -> None:
        """Steer by these adapters from now on, whose edits add up; by none for the base model.

        Raises:
            ValueError: an unknown name, one given twice, or adapters that edit different tokens. Nothing changes then.
        """
        self._check_names(names)
        if len(set(names)) < len(names):
            raise ValueError(f"{'+'.join(names)} names an adapter twice; /alpha makes one stronger.")
        positions = {name: self.config(name).positions for name in names}
        if len(set(positions.values())) > 1:
            listed = ", ".join(f"{name} {kind!r}" for name, kind in positions.items())
            raise ValueError(f"These adapters edit different tokens of a conversation ({listed}); use one at a time.")
        self._activate(names)

    def _activate(self, names: Sequence[str]) -> None:
        if names:
            cast(PSRModel, self.model.base_model).set_adapter(list(names), inference_mode=True)
        self._active = tuple(names)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                raise ValueError(f"No adapter {name!r}; there are: {', '.join(self.names)}, or {BASE}.")

    def set_alpha(self, alpha: float, name: str | None = None) -> None:
        """Set the strength of one adapter, or of all active ones; `ValueError` if not finite or there is none."""
        alpha = check_strength(alpha, "alpha")
        if name is None and not self.active:
            raise ValueError(f"No adapter is active. Name one: /alpha {self.names[0]} {alpha:g}")
        names = self.active if name is None else [name]
        self._check_names(names)
        for each in names:
            self.model.set_alpha(alpha, adapter_name=each)

    def set_system(self, text: str) -> None:
        """Set or, with empty text, remove the system turn; `ValueError` and no change if the template has no place."""
        turn = [{"role": "system", "content": text}] if text else []
        self._render([*turn, {"role": "user", "content": "hello"}])
        self._system: list[Message] = turn

    @property
    def system(self) -> str:
        """Text of the system turn, empty if there is none."""
        return self._system[0]["content"] if self._system else ""

    def reset(self) -> None:
        """Forget the conversation; the system turn, the adapters and their strengths stay."""
        self.messages, self.last = [], None

    def ask(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> ChatAnswer:
        """Answer a question as the conversation's next turn, and call `on_text` with each piece as it comes.

        Ctrl-C ends the answer there. `ValueError` if the conversation is too long for the model, or the chat template
        won't have it; it is as it was before then.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        conversation = [*self._system, *messages]
        prompt = self._encode(conversation)
        room = self._room(prompt["input_ids"].shape[1])
        limit = self.max_new_tokens if room is None else min(room, self.max_new_tokens)
        streamer = _Streamer(self.processing_class, on_text, self._stops())
        interrupted = False
        try:
            self._generate(prompt, limit, streamer)
        except KeyboardInterrupt:
            streamer.end()
            interrupted = True
        ended = bool(streamer.ids) and streamer.ids[-1] in self._stops()
        ids = streamer.ids[:-1] if ended else streamer.ids
        cut = None
        if interrupted:
            cut = "interrupted"
        elif not ended and len(ids) >= limit:  # else a text of the model's settings has ended it
            cut = "max_new_tokens" if limit == self.max_new_tokens else "context"
        text = str(self.processing_class.decode(ids, skip_special_tokens=False))
        said = split_reasoning(text, opens_reasoning(render_prompt(self.processing_class, conversation))).answer
        alphas = {name: self.config(name).alpha for name in self.active}
        turn = None if said is None else said.strip()
        tokens = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        answer = ChatAnswer(text, tokens, prompt, alphas, cut, turn)
        if ids or not interrupted:
            self.last = answer
            if turn is not None:
                self.messages = [*messages, {"role": "assistant", "content": turn}]
        return answer

    def _generate(self, prompt: dict[str, torch.Tensor], max_new_tokens: int, streamer: TextStreamer) -> None:
        settings: AbstractContextManager[None] = nullcontext()
        sampling: dict[str, Any] = {}
        if self.temperature == 0:
            settings = own_distribution(self.model)
        elif self.temperature is not None:
            sampling = {"do_sample": True, "temperature": self.temperature}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with settings, torch.random.fork_rng(devices), nullcontext() if self.active else unedited(self.model):
            torch.manual_seed(self.seed + len(self.messages))
            self.model.generate(
                **prompt,
                **sampling,
                max_new_tokens=max_new_tokens,
                num_beams=1,  # beams can't be shown as they come
                streamer=streamer,
                eos_token_id=self._stops() or None,
                tokenizer=self.processing_class,
                pad_token_id=pad_id(self.processing_class),
            )

    def _stops(self) -> list[int]:
        """Tokens that end a turn."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return [token for token in {*ends, self.processing_class.eos_token_id} if token is not None]

    def _room(self, length: int) -> int | None:
        """Tokens left for an answer after `length` of conversation; `None` for a model without a limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise ValueError(
                f"With this the conversation has {length} tokens, and the model takes {limit}: /reset to start anew."
            )
        return None if limit is None else limit - length

    def _encode(self, conversation: list[Message]) -> dict[str, torch.Tensor]:
        self._render(conversation)
        positions = self.config(self.active[0]).positions if self.active else "all"
        try:
            return encode_chat(self.processing_class, [conversation], positions, self.model.device)
        except ValueError as error:
            raise ValueError(
                f"Which tokens to edit can't be told: {error} /reset starts a new conversation."
            ) from error

    def _render(self, conversation: list[Message]) -> None:
        try:
            render_prompt(self.processing_class, conversation)
        except TemplateRefusal as error:
            raise ValueError(f"The model's chat template refuses this: {error.reason}") from error

    def gates(self, digits: bool = False, encoding: str = "utf-8") -> dict[str, Text]:
        """The last answer shaded for each adapter that was active then, at the strengths it had; see `shaded_answer`.

        Raises:
            ValueError: there is no answer yet, it is empty, or it was the base model's.
        """
        answer = self.last
        if answer is None or not answer.text:
            raise ValueError("There is no answer to look at yet." if answer is None else "The last answer is empty.")
        if not answer.alphas:
            raise ValueError("The last answer is the base model's: no gates acted on it.")
        active, alphas = self.active, {name: self.config(name).alpha for name in answer.alphas}
        self._activate(list(answer.alphas))
        try:
            for name, alpha in answer.alphas.items():
                self.set_alpha(alpha, name)
            return {
                name: shaded_answer(
                    self.model, self.processing_class, answer.prompt, answer.ids, name, digits, encoding
                )
                for name in answer.alphas
            }
        finally:
            for name, alpha in alphas.items():
                self.set_alpha(alpha, name)
            self._activate(active)

    def layers(self, name: str) -> list[int | str]:
        """The layers that an adapter edits."""
        return [layer for layer, module in self.model.psr_layers().items() if name in module.psr_unit]


class _Streamer(TextStreamer):
    """Hands on text as it comes, and keeps the tokens."""

    def __init__(
        self, processing_class: PreTrainedTokenizerBase, on_text: Callable[[str], None], stops: Collection[int]
    ) -> None:
        super().__init__(processing_class, skip_prompt=True, skip_special_tokens=False)
        self.on_text, self.stops = on_text, stops
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        tokens = value.flatten().tolist()
        if not self.next_tokens_are_prompt:
            self.ids += tokens
            if tokens[-1] in self.stops:  # the end of the turn is no part of the text
                return
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
