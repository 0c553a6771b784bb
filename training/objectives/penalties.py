"""What is added to the objectives to keep gates alive or edits small, as one number a triplet: (batch,) float32.

regulariser    sum over layers of max(0, 1 - sum over tokens of lambda)                    METHOD 4, [r]
norm penalty   mean over layers and tokens of |edit|^2 / |A_l|^2                           docs/results.md
"""

from collections.abc import Callable

import torch

from peft_psr.rows import EACH_ROW
from peft_psr.training.passes.branches import psr_model

from .objective import Passes
from .tokens import row_means, rows_of


def gate_regularizer(gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hinge (batch,) that wants one layer's gates (tokens, r) to open by 1 in sum over each triplet's edited tokens.

    Ranks each have a hinge of their own. Note that a gate at exactly 0 on all tokens has no gradient, here neither.
    """
    rows = rows_of(mask).to(gates.device)
    sums = gates.new_zeros(mask.shape[0], gates.shape[-1]).index_add(0, rows, gates)
    return (1.0 - sums).clamp(min=0).sum(dim=-1)


def norm_penalty(
    gates: torch.Tensor, direction: torch.Tensor, strength: torch.Tensor, stream: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """|edit|^2 / |stream|^2 of one layer's edit, mean over each triplet's edited tokens, (batch,).

    `gates` are lambda (tokens, r), `direction` each triplet's z (batch, r, d), `strength` alpha + b_m (batch,),
    `stream`
    the layer's output (tokens, d), through which no gradient goes, `mask` (batch, seq) the edited tokens.
    """
    rows = rows_of(mask).to(gates.device)
    products = (direction @ direction.transpose(1, 2))[rows]
    squares = torch.einsum("tr,trs,ts->t", gates, products, gates) * strength.to(gates.device)[rows].square()
    return row_means(squares / stream.detach().float().square().sum(dim=-1), rows, mask.shape[0])


def closed_gates(passes: Passes) -> torch.Tensor:
    """The gate regulariser of a batch, sum over layers, 0 for neutral triplets; (batch,)."""
    neutral = passes.batch["neutral"]
    hinges = [gate_regularizer(gates, passes.mask).to(neutral.device) for gates in passes.student.gates.values()]
    return torch.stack(hinges).sum(dim=0) * ~neutral


def relative_norm(passes: Passes) -> torch.Tensor:
    """The norm penalty of a batch, mean over layers; (batch,)."""
    batch, layers = passes.batch, {layer.name: layer for layer in psr_model(passes.model).psr_layers().values()}
    penalties = []
    for (name, adapter), gates in passes.student.gates.items():
        layer, several = layers[name], adapter == EACH_ROW
        owners = passes.adapters if several else [adapter]
        own = batch["adapter"] if several else torch.zeros_like(batch["adapter"])
        directions = torch.stack([layer.unit(owner).direction for owner in owners])
        biases = torch.tensor([layer.config[owner].coefficient_bias for owner in owners], device=own.device)
        direction = directions[own.to(directions.device)]
        strength = batch["alpha"] + biases[own]
        penalty = norm_penalty(gates, direction, strength, passes.student.hidden[name], passes.mask)
        penalties.append(penalty.to(own.device))
    return torch.stack(penalties).mean(dim=0)


PENALTIES: dict[str, Callable[[Passes], torch.Tensor]] = {"regularizer": closed_gates, "norm_penalty": relative_norm}
"""By the fields of `PSRTrainingArguments` that hold their weights."""
