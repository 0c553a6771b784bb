"""Sampling a row of a batch by its own seed: the same text whatever else is in the batch.

The Gumbel-max trick: argmax_v (logits_v / T + G_v) is a draw from softmax(logits / T) when the G_v are independent
standard Gumbel variables. Here G_v is a pure function of (seed, step, v), so it needs no generator whose state depends
on the rows beside it. Gumbel (1954); the function is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which hashes a
counter to 64 bits.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


def _signed(number: int) -> int:
    """An integer modulo 2^64, as `torch.int64` holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_INCREMENT, _FIRST, _SECOND = (
    _signed(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_UNIFORM_BITS = 40  # more than float32's 24: the smallest values decide about rare tokens


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix(states: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function, int64 to int64 of the same shape; multiplication wraps."""
    states = (states ^ _shift_right(states, 30)) * _FIRST
    states = (states ^ _shift_right(states, 27)) * _SECOND
    return states ^ _shift_right(states, 31)


def gumbel_noise(seeds: torch.Tensor, step: int, size: int) -> torch.Tensor:
    """Standard Gumbel variables, (batch, size) float32, that depend on nothing but their seed, step and place.

    `seeds`, (batch,) int64, are one a row; `step` counts the tokens drawn before; `size` is the vocabulary's.
    """
    states = _splitmix(_splitmix(seeds) + _signed((step + 1) * _INCREMENT))[:, None]
    places = torch.arange(1, size + 1, device=seeds.device)
    bits = _shift_right(_splitmix(states + places * _INCREMENT), 64 - _UNIFORM_BITS)
    uniform = (bits.float() + 0.5) * 2.0**-_UNIFORM_BITS
    # -log1p(-u) is an exponential variable, exact for small u; rounding may have made u = 1
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


class GumbelLogitsProcessor(LogitsProcessor):
    """Turns greedy decoding into sampling from softmax(logits / temperature), each row by its own seed.

    Use it with `generate(do_sample=False, ...)`, whose argmax completes the draw.

    Args:
        seeds: One for each row, 0 ≤ seed < 2^63.
        prompt_length: Columns of the prompts, padding included; what comes after them was drawn.
        temperature: Above 0.
        device: Where the logits are.
    """

    def __init__(
        self, seeds: Sequence[int], prompt_length: int, temperature: float, device: torch.device | str
    ) -> None:
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)  # (batch,)
        self.prompt_length, self.temperature = prompt_length, temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Adds this step's noise to logits (batch, vocabulary), so that their argmax is the draw."""
        step = input_ids.shape[1] - self.prompt_length
        noise = gumbel_noise(self.seeds.to(scores.device), step, scores.shape[1])
        return scores / self.temperature + noise  # type: ignore[return-value]
