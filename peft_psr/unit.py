"""What an adapter does at one layer: its weights there, and the edit, which is spelled here alone.

For a stream h (batch, seq, d) and rank r:

    lambda = ReLU(h @ w + b)                            gate values (batch, seq, r)
    h  <-  h + (alpha + b_m) * m * (lambda @ z)         m: position mask (batch, seq)

Source: "Steer Like the LLM", arXiv 2605.03907.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .call_state import Strength


def add_edit(stream: torch.Tensor, gates: torch.Tensor, direction: torch.Tensor, strength: Strength) -> torch.Tensor:
    """`stream + strength * gates @ direction`, float32, in as few operations as there are.

    Args:
        stream: (..., d), any float dtype.
        gates: (..., r), float32.
        direction: (r, d), or (batch, r, d) for one a row.
        strength: Broadcasts over (..., r).
    """
    value = 1.0
    if isinstance(strength, torch.Tensor):
        gates = gates * strength
    else:
        value = strength
    if direction.shape[-2] == 1:  # an outer product
        return torch.addcmul(stream, gates, direction, value=value)
    if direction.dim() == 3 and stream.dtype is not torch.float64:
        return torch.baddbmm(stream.float(), gates, direction, alpha=value)
    # not one addmm over all rows: its result would be a view, which FSDP2 can't guard against writing in place
    return torch.add(stream, gates @ direction, alpha=value)


class PSRUnit(nn.Module):
    """One adapter's weights at one layer, float32 whatever the model's dtype.

    Attributes:
        gate_weight: w, (r, d); absent with a constant gate.
        gate_bias: b, (r,); absent with a constant gate.
        direction: z, (r, d).
    """

    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(self, width: int, r: int, gate: str, init_weights: bool) -> None:
        """Make the weights for a stream of `width` features and initialise them as `PSRConfig.init_weights` says."""
        super().__init__()
        self.direction = nn.Parameter(torch.empty(r, width, dtype=torch.float32))
        gated = gate == "relu"
        for name, shape in (("gate_weight", (r, width)), ("gate_bias", (r,))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)) if gated else None)
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool) -> None:
        """A no-op with open gates (`True`), or uniform within +-1/sqrt(d) as a linear layer starts (`False`).

        A no-op's first gate is open everywhere; further ones get a random w, for equal ranks would stay equal.
        """
        bound = self.direction.shape[1] ** -0.5
        if not init_weights:
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound)
            return
        self.direction.zero_()
        if self.gate_weight is not None and self.gate_bias is not None:
            self.gate_weight[:1].zero_()
            self.gate_weight[1:].uniform_(-bound, bound)
            self.gate_bias.fill_(1.0)

    def forward(
        self, hidden: torch.Tensor, stream: torch.Tensor, strength: Strength
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`stream` (..., d) with the edit that follows from `hidden` (..., d), and the gate values (..., r); float32.

        `strength` broadcasts over (..., r). The two streams differ where several adapters edit one after another.
        """
        weights: dict[str, Any] = self._parameters
        try:
            weight, bias, direction = weights["gate_weight"], weights["gate_bias"], weights["direction"]
        except KeyError:  # pruned, or made of others by a parametrization
            weight, bias, direction = self.gate_weight, self.gate_bias, self.direction
        if direction.dtype is not torch.float32:  # FSDP2's mixed precision hands the weights over in half precision
            direction = direction.float()
            weight, bias = (None, None) if weight is None or bias is None else (weight.float(), bias.float())
        if weight is None or bias is None:
            gates = hidden.new_ones(*hidden.shape[:-1], direction.shape[0], dtype=torch.float32)
        else:
            hidden = hidden if hidden.dtype is torch.float32 else hidden.float()
            if weight.shape[0] == 1 and torch.compiler.is_compiling():
                # a sum rather than a product of matrices: the compiler makes one kernel of it and what follows
                gates = ((hidden * weight).sum(dim=-1, keepdim=True) + bias).relu()
            else:
                gates = F.linear(hidden, weight, bias).relu()
        return add_edit(stream, gates, direction, strength), gates

    def gate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W (r, d) and b (r,); 0 and 1 for a constant gate, which is ReLU(h @ 0 + 1)."""
        if self.gate_weight is None or self.gate_bias is None:
            return torch.zeros_like(self.direction), torch.ones_like(self.direction[:, 0])
        return self.gate_weight, self.gate_bias

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Name the widths where weights are for a stream of another one."""
        width, given = self.direction.shape[1], state_dict.get(f"{prefix}direction")
        if given is not None and given.shape[-1] != width:
            message = (
                f"the adapter's weights are for a stream of {given.shape[-1]} features, and the model's has {width}"
            )
            if message not in error_msgs:
                error_msgs.append(message)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PSRUnit:
        """Follow the model to another device, but not to another dtype: the edit is computed in float32."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if tensor.is_meta or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
