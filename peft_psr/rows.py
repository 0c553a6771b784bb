"""One adapter per row of a batch, without a loop over adapters: weights are stacked and gathered once a call.

    row i, adapter a:   lambda_i = ReLU(h_i @ w_a + b_a),   h_i <- h_i + (alpha_i + b_m,a) * m_i * (lambda_i @ z_a)

Ranks are padded with zeros to the largest one; a constant gate is w = 0, b = 1; a row without an adapter is all zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .config import PSRConfig
from .unit import PSRUnit


BASE = "__base__"
"""PEFT's name for a row without an adapter."""

EACH_ROW = "*"
"""In place of an adapter's name: each row's own."""


@dataclass
class RowAdapters:
    """The weights of one layer gathered for the rows of a batch.

    Attributes:
        gate_weight: w, (rows, r, d).
        gate_bias: b, (rows, 1, r).
        direction: z, (rows, r, d).
        alpha: Each row's own strength, (rows, 1, 1).
        coefficient_bias: (rows, 1, 1).
        positions: For each kind of positions the rows that use it, (rows, 1, 1) of 0/1.
    """

    gate_weight: torch.Tensor
    gate_bias: torch.Tensor
    direction: torch.Tensor
    alpha: torch.Tensor
    coefficient_bias: torch.Tensor
    positions: dict[str, torch.Tensor]

    def repeat(self, times: int) -> RowAdapters:
        """Each row `times` over, for beams and several return sequences."""
        if times == 1:
            return self
        repeated = partial(torch.repeat_interleave, repeats=times, dim=0)
        return RowAdapters(
            gate_weight=repeated(self.gate_weight),
            gate_bias=repeated(self.gate_bias),
            direction=repeated(self.direction),
            alpha=repeated(self.alpha),
            coefficient_bias=repeated(self.coefficient_bias),
            positions={kind: repeated(rows) for kind, rows in self.positions.items()},
        )

    def gates(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gate values (rows, seq, r), float32, of hidden states (rows, seq, d)."""
        return F.relu(torch.baddbmm(self.gate_bias, hidden.float(), self.gate_weight.transpose(1, 2)))


def gather_rows(
    units: Mapping[str, PSRUnit], configs: Mapping[str, PSRConfig], names: Sequence[str]
) -> RowAdapters | None:
    """Stack the units of the adapters in `names` and pick each row's; `None` if no row has one at this layer."""
    used = [name for name in dict.fromkeys(names) if name in units]
    if not used:
        return None
    first = units[used[0]].direction
    r = max(units[name].direction.shape[0] for name in used)

    def stacked(values: list[torch.Tensor]) -> torch.Tensor:
        padded = [F.pad(value, (0, 0, 0, r - value.shape[0])) for value in values]
        return torch.stack([*padded, torch.zeros_like(padded[0])])

    gates = [units[name].gate() for name in used]
    index = torch.tensor([used.index(name) if name in used else len(used) for name in names], device=first.device)

    def setting(values: list[float]) -> torch.Tensor:
        return torch.tensor([*values, 0.0], device=first.device)[index].view(-1, 1, 1)

    kinds = {configs[name].positions for name in used}
    return RowAdapters(
        gate_weight=stacked([weight for weight, _ in gates])[index],
        gate_bias=stacked([bias[:, None] for _, bias in gates])[index].transpose(1, 2),
        direction=stacked([units[name].direction for name in used])[index],
        alpha=setting([configs[name].alpha for name in used]),
        coefficient_bias=setting([configs[name].coefficient_bias for name in used]),
        positions={kind: setting([float(configs[name].positions == kind) for name in used]) for kind in kinds},
    )
