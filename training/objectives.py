"""The losses a PSR adapter is trained by.

All average over the tokens of a triplet first, then over triplets, so that each triplet counts alike whatever its
length, as it does at the reported batch size of 1.

    MSE   sum over layers of mean over (tokens x d) of (A_{l|AS} - A_{l|PS})^2                METHOD 4, [R]
    LL    mean cross-entropy of y' given x under the edited model                              METHOD 4, [P]
    regulariser   sum over layers of mean over triplets of max(0, 1 - sum over tokens of lambda)   METHOD 4, [r]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F


def token_weights(mask: torch.Tensor) -> torch.Tensor:
    """Weight of each masked token, row after row: 1 / (tokens of its row x rows); (tokens,) float32, sums to 1."""
    counts = mask.bool().sum(dim=1)
    return (1.0 / (counts * (counts > 0).sum()))[rows_of(mask)]


def rows_of(mask: torch.Tensor) -> torch.Tensor:
    """The batch row of each masked token; (tokens,) int64."""
    return mask.bool().nonzero()[:, 0]


def triplet_weights(mask: torch.Tensor) -> torch.Tensor:
    """Weights that average each triplet's masked tokens; (batch, tokens) float32, every row sums to 1."""
    own = F.one_hot(rows_of(mask), mask.shape[0]).T
    return own / own.sum(dim=1, keepdim=True)


def mse_by_layer(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """MSE of each layer; squares in float32.

    Args:
        student: {layer name: (tokens, d)}.
        teacher: The same, in the same order of tokens.
        weights: (tokens,), from `token_weights`, for one mean over the batch; (batch, tokens), from `triplet_weights`,
            for one mean a triplet.
    """
    return {
        name: ((hidden.float() - teacher[name].float()).square().mean(dim=-1) * weights.to(hidden.device)).sum(dim=-1)
        for name, hidden in student.items()
    }


def likelihood_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats) of the tokens of y', each predicted from the position before it.

    The first prediction, of y'_1, is made at the last prompt token: the first one an edit can reach.

    Args:
        logits: (batch, seq, vocabulary).
        labels: (batch, seq), -100 outside y'.
    """
    targets = labels[:, 1:]
    mask = targets != -100
    losses = F.cross_entropy(logits[:, :-1][mask].float(), targets[mask], reduction="none")
    return (losses * token_weights(mask)).sum()


def gate_regularizer(gates: Mapping[tuple[str, str], torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Hinge that wants every layer's gates to open by 1 in sum over each triplet's edited tokens.

    Ranks each have a hinge of their own. Note that a gate at exactly 0 on all tokens has no gradient, here neither.

    Args:
        gates: {(layer name, adapter): lambda (tokens, r)}.
        mask: (batch, seq), the edited tokens.
    """
    rows, batch = rows_of(mask), mask.shape[0]
    total = torch.zeros((), device=mask.device)
    for values in gates.values():
        sums = values.new_zeros(batch, values.shape[-1]).index_add(0, rows.to(values.device), values)
        total = total + (1.0 - sums).clamp(min=0).mean(dim=0).sum().to(total.device)
    return total
