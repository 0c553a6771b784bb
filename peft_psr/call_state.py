"""What one forward call is to do: its masks and strengths, worked out once at the model's door for all its layers.

The hooks in `hooks` call `SteeringState.begin_call`; the layers read what it leaves.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch

from peft_psr.base_model.caches import cache_of, ends_in_prompt, first_given, tokens_in

from .config import PSRWarning, check_strength
from .positions import default_mask


Strength = float | torch.Tensor
"""One strength for all rows, or a tensor (batch,) with one for each."""


def check_row_count(names: Sequence[str], rows: int, repeated: bool = False, where: str = "") -> None:
    """Raise `ValueError`, with `where` it was seen, unless a call's `adapter_names` are as many as the batch's rows.

    With `repeated` each row may stand there several times over, as for beams.
    """
    if rows % len(names) if repeated else rows != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} names and {rows} rows{where}."
        )


@dataclass
class Generation:
    """The prompt of a `generate()` call in progress: known ahead, so that no step has to guess what it sees.

    Attributes:
        attention_mask: (batch, prompt) of the prompt, 0 on padding.
        steering_mask: (batch, prompt) as the caller gave it, or `None`.
        seen: Prompt tokens that earlier steps have put into the cache.
        caches: A step was given its cache as an argument, so that every further one will be.
        decoding: The whole prompt is in the cache; every further token is edited.
    """

    attention_mask: torch.Tensor
    steering_mask: torch.Tensor | None
    seen: int = 0
    caches: bool = False
    decoding: bool = False


@dataclass
class SteeringState:
    """Shared by a model's PSR layers. Set by `begin_call`, kept until the next call (checkpointing runs layers twice).

    Attributes:
        positions: Kinds of positions that the model's adapters use.
        scale: Factor on every strength, set by `alpha_scale`.
        alpha: Strength for this call in place of the adapters' own: a float, (batch, 1, 1), or `None`.
        masks: For each kind of positions (batch, seq) bool, or `None` to edit every token.
        gates: Where layers leave their gate values, {(layer name, adapter): (batch, seq, r)}, while someone looks.
        adapter_names: One adapter's name for each row, or `None` for the active adapters on all.
        generation: The `generate()` call in progress.
        generation_alpha: That call's strength.
        predicts_tokens: The model is a language model, with a head.
        begun: The model's pre-hook has begun this call; its decoder's need not.
        prompt_ends: This call takes its text for a prompt and edits the last token: it was given neither mask nor
            labels, and positions "response".
        warned: What was warned of already.
        lock: Held by `PeftModel.forward` and by `generate`, so that threads take turns.
        remembered: See `remember`; forgotten whenever anything else here is set.
    """

    positions: set[str] = field(default_factory=set)
    scale: float = 1.0
    alpha: Strength | None = None
    masks: dict[str, torch.Tensor | None] = field(default_factory=dict)
    gates: dict[tuple[str, str], torch.Tensor] | None = None
    adapter_names: list[str] | None = None
    generation: Generation | None = None
    generation_alpha: Any = None
    predicts_tokens: bool = False
    begun: bool = False
    prompt_ends: bool = False
    warned: set[str] = field(default_factory=set)
    lock: RLock = field(default_factory=RLock, compare=False)
    remembered: tuple[str | list[str], str, Strength] | None = field(default=None, init=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what a strength may follow from, and forget the one that was remembered."""
        super().__setattr__(name, value)
        super().__setattr__("remembered", None)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Inside, every strength is multiplied by `scale`."""
        before, self.scale = self.scale, check_strength(scale, "scale")
        try:
            yield
        finally:
            self.scale = before

    def remember(self, active: str | list[str], name: str, strength: Strength) -> None:
        """Leave what a call's first edited layer worked out for the others, so that they need no Python for it.

        `active` is what layers call active: one gated adapter, `name`, at whose gates nobody looks. The strength is
        one number, or (batch, seq, 1).
        """
        super().__setattr__("remembered", (active, name, strength))

    def recall(self, active: str | list[str], hidden: torch.Tensor) -> tuple[str, Strength] | None:
        """Name and strength of the one adapter that edits `hidden` (batch, seq, d), as far as they are remembered."""
        remembered = self.remembered
        if remembered is None or remembered[0] != active or hidden.dim() < 3:
            return None
        _, name, strength = remembered
        if isinstance(strength, float) or (
            strength.shape[:-1] == hidden.shape[:-1] and strength.device == hidden.device
        ):
            return name, strength
        return None

    def forget(self) -> None:
        """For changes of what a layer knows by itself: an adapter's configuration, say."""
        super().__setattr__("remembered", None)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the lock."""
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """A lock of its own."""
        vars(self).update(kept, lock=RLock())

    def begin_call(self, arguments: dict[str, Any], encoder_decoder: bool = False) -> None:
        """Work out masks and strength from the arguments of the model's forward call.

        What an encoder-decoder's decoder reads is all response: every token is edited unless `steering_mask` says
        otherwise.

        Raises:
            TypeError: `adapter_names` is given to a model that is not a `PeftModel`.
            ValueError: `adapter_names`, `steering_mask` or `alpha` does not fit the call's rows and tokens.
        """
        if arguments.get("adapter_names") is not None:
            raise TypeError("adapter_names is for a PeftModel: the bare model's forward can't choose adapters by row.")
        steering_mask, alpha = arguments.pop("steering_mask", None), arguments.pop("alpha", None)
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels") if encoder_decoder else ()
        tokens = first_given(arguments.get(name) for name in (*names, "input_ids", "inputs_embeds"))
        self.masks = dict.fromkeys(self.positions)
        self.alpha = None
        self.prompt_ends = False
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            return
        batch, length = tokens.shape[:2]
        expected = batch if self.generation is None else self.generation.attention_mask.shape[0]
        if self.adapter_names is not None and self.generation is None:
            check_row_count(self.adapter_names, batch)
        alpha = self.generation_alpha if alpha is None else alpha
        self.alpha = prepare_alpha(alpha, batch, expected, tokens.device)
        if self.generation is not None and self._continue_generation(batch, length, arguments, tokens.device):
            return
        if steering_mask is not None:
            mask = check_mask(steering_mask, batch, length).to(tokens.device)
            self.masks = dict.fromkeys(self.positions, mask)
            self._check_prefix(arguments, mask[:, 0])
        elif encoder_decoder:
            return
        elif length > 1:  # a single token is the last of its prompt, or was generated
            if arguments.get("attention_mask") is None and "response" not in self.positions:
                return  # every token
            attention_mask = token_mask(arguments, batch, length, tokens.device)
            labels = arguments.get("labels")
            if not isinstance(labels, torch.Tensor) or labels.shape != (batch, length):  # of a sequence, say
                labels = None
            self.masks = {kind: default_mask(kind, attention_mask, labels) for kind in self.positions}
            if arguments.get("labels") is None and "response" in self.positions:
                self._take_for_prompt(arguments)
            elif labels is not None:
                self._check_prefix(arguments, labels[:, 0] != -100)
        elif (
            "response" in self.positions
            and arguments.get("use_cache") is not False
            and not torch.compiler.is_compiling()  # torch 2.7 can't count the tokens of a static cache there
            and not cache_length(arguments)
        ):
            self._take_for_prompt(arguments)

    def _take_for_prompt(self, arguments: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.scale == 0 or (isinstance(self.alpha, float) and self.alpha == 0):
            return
        self.prompt_ends = True
        self._check_prefix(arguments)

    def _check_prefix(self, arguments: dict[str, Any], goes_on: torch.Tensor | None = None) -> None:
        """Warn of a cache that ends in an edited token if the response does not follow it in each row: `goes_on`."""
        if torch.compiler.is_compiling() or not ends_in_prompt(cache_of(arguments)):
            return
        if goes_on is None or not goes_on.all():
            self.warn_once(
                "The text of this call goes on from a cache whose last token was edited as the end of a prompt. If "
                "both are parts of one prompt, run all but the last part with `alpha=0.0`, or give each its "
                "`steering_mask`."
            )

    def warn_once(self, message: str) -> None:
        """Warn with `PSRWarning`, of each thing once a model."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, PSRWarning, stacklevel=3)

    def _continue_generation(self, batch: int, length: int, arguments: dict[str, Any], device: torch.device) -> bool:
        """Work out the masks of a step of the `generate()` in progress; false if this call is none of its steps."""
        generation = self.generation
        assert generation is not None
        cache = cache_of(arguments)
        if generation.caches and cache is None:  # a logits processor that calls the model, say
            return False
        generation.caches = cache is not None
        if generation.decoding:
            return True
        prompt = generation.attention_mask.shape[1]
        # a cache of another kind (Mamba's) shows by itself: the call brings no more tokens than were seen already
        without = arguments.get("use_cache") is False
        cached = cache is not None or (not without and 0 < length <= generation.seen)
        if not cached and length < prompt:
            return False
        start = max(generation.seen, cache_length(arguments)) if cached else 0
        generation.seen = start + length
        generation.decoding = cached and generation.seen >= prompt
        for kind in self.positions:
            given = generation.steering_mask
            mask = default_mask(kind, generation.attention_mask) if given is None else given
            # beams and several return sequences a prompt: every prompt's rows stand together
            mask = mask.to(device).bool().repeat_interleave(batch // mask.shape[0], dim=0)
            new = mask.new_ones(batch, max(0, start + length - prompt))
            self.masks[kind] = torch.cat([mask, new], dim=1)[:, start : start + length]
        return True


def prepare_alpha(alpha: Any, batch: int, rows: int, device: torch.device) -> Strength | None:
    """A strength that broadcasts over (batch, seq, r): a number, or one a row as (batch, 1, 1) float32.

    `alpha` is a number, or a sequence or tensor of as many as the `rows` that the caller gave: fewer than the call's
    `batch` where beams or return sequences repeat them.

    Raises:
        TypeError: not a number nor a sequence of numbers.
        ValueError: not finite, or not as many as there are rows.
    """
    if alpha is None:
        return None
    if isinstance(alpha, (list, tuple)):
        alpha = torch.tensor([check_strength(value, "alpha") for value in alpha])
    if not isinstance(alpha, torch.Tensor):
        return check_strength(alpha, "alpha")
    if alpha.dtype == torch.bool:
        raise TypeError("alpha must be numbers, got a tensor of bools; masks go in `steering_mask`.")
    if not torch.compiler.is_compiling() and not torch.isfinite(alpha).all():
        raise ValueError(f"alpha must be finite, got {alpha.tolist()}.")
    if alpha.dim() == 0:
        return alpha.float().to(device)
    if tuple(alpha.shape) != (rows,):
        raise ValueError(f"alpha must be one number or one per row ({rows} rows), got shape {tuple(alpha.shape)}.")
    return alpha.float().to(device).repeat_interleave(batch // rows).view(batch, 1, 1)


def check_mask(mask: Any, batch: int, length: int) -> torch.Tensor:
    """The caller's `steering_mask` as (batch, length) bool; `TypeError` if it is no tensor, `ValueError` if wrong."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"steering_mask must be a tensor of 0/1, shape (batch, seq), got {type(mask).__name__}.")
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"steering_mask must have the shape of input_ids, {(batch, length)}, got {tuple(mask.shape)}."
        )
    chosen = mask.bool()
    if mask.is_floating_point() and not torch.compiler.is_compiling() and not torch.equal(chosen.to(mask.dtype), mask):
        raise ValueError("steering_mask must be 0 or 1 at each token; how strong the edit is, is `alpha`.")
    return chosen


def token_mask(arguments: dict[str, Any], batch: int, length: int, device: torch.device) -> torch.Tensor:
    """The part of a call's (batch, past + seq) attention mask that covers its own tokens; all ones without one.

    The mask of a cache of fixed size goes on beyond them.
    """
    attention_mask = arguments.get("attention_mask")
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return torch.ones(batch, length, dtype=torch.long, device=device)
    start = attention_mask.shape[1] - length
    if start > 0:
        start = min(start, cache_length(arguments))
    return attention_mask[:, start : start + length].to(device)


def cache_length(arguments: dict[str, Any]) -> int:
    """Tokens already in the key/value cache of this call."""
    return tokens_in(cache_of(arguments))
