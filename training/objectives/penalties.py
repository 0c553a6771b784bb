"""What is added to the objectives to keep gates alive or edits small, as one number a triplet: (batch,) float32.

regulariser    sum over layers of max(0, 1 - sum over tokens of lambda)                    METHOD 4, [r]
norm penalty   mean over layers and tokens of |edit|^2 / |A_l|^2                           docs/results.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from peft_psr.rows import EACH_ROW
from peft_psr.training.passes.branches import Batch, Branch

from .losses import row_means, rows_of


def gate_regularizer(gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hinge that wants one layer's gates to open by 1 in sum over each triplet's edited tokens.

    Ranks each have a hinge of their own. Note that a gate at exactly 0 on all tokens has no gradient, here neither.

    Args:
        gates: lambda (tokens, r).
        mask: (batch, seq), the edited tokens.

    Returns:
        (batch,).
    """
    rows = rows_of(mask).to(gates.device)
    sums = gates.new_zeros(mask.shape[0], gates.shape[-1]).index_add(0, rows, gates)
    return (1.0 - sums).clamp(min=0).sum(dim=-1)


def norm_penalty(
    gates: torch.Tensor, direction: torch.Tensor, strength: torch.Tensor, stream: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """|edit|^2 / |stream|^2 of one layer's edit, mean over each triplet's edited tokens.

    Args:
        gates: lambda (tokens, r).
        direction: z (batch, r, d), each triplet's.
        strength: (batch,), alpha + b_m.
        stream: The layer's output (tokens, d); no gradient goes through it.
        mask: (batch, seq), the edited tokens.

    Returns:
        (batch,).
    """
    rows = rows_of(mask).to(gates.device)
    products = (direction @ direction.transpose(1, 2))[rows]
    squares = torch.einsum("tr,trs,ts->t", gates, products, gates) * strength.to(gates.device)[rows].square()
    return row_means(squares / stream.detach().float().square().sum(dim=-1), rows, mask.shape[0])


def relative_norm(
    student: Branch,
    units: Mapping[tuple[str, str], tuple[torch.Tensor, float]],
    adapters: Sequence[str],
    batch: Batch,
) -> torch.Tensor:
    """The norm penalty of a batch, mean over layers; (batch,).

    Args:
        student: The steered model's pass.
        units: {(layer name, adapter): (z (r, d), b_m)}.
        adapters: The adapters that are trained, as `batch["adapter"]` counts them.
        batch: The batch.
    """
    penalties = []
    for (layer, name), gates in student.gates.items():
        owners = adapters if name == EACH_ROW else [name]
        own = batch["adapter"] if name == EACH_ROW else torch.zeros_like(batch["adapter"])
        directions = torch.stack([units[layer, owner][0] for owner in owners])
        biases = torch.tensor([units[layer, owner][1] for owner in owners], device=own.device)
        strength = batch["alpha"] + biases[own]
        direction = directions[own.to(directions.device)]
        penalty = norm_penalty(gates, direction, strength, student.hidden[layer], batch["steering_mask"])
        penalties.append(penalty.to(own.device))
    return torch.stack(penalties).mean(dim=0)
