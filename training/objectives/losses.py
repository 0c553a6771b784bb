"""The losses a PSR adapter is trained by, each as one number a triplet: (batch,) float32.

All average over the tokens of a triplet first, then over triplets, so that each triplet counts alike whatever its
length, as it does at the reported batch size of 1.

    MSE   sum over layers of mean over (tokens x d) of (A_{l|AS} - A_{l|PS})^2                METHOD 4, [R]
    LL    mean cross-entropy of y' given x under the edited model                              METHOD 4, [P]
    KL    mean over response tokens of KL(p(. | x' y'_<i) || p_edited(. | x y'_<i))            docs/results.md

LL knows of the prompted model's distribution the one token that was sampled; KL takes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


LOGITS_AT_ONCE = 2**25
"""Most logits (128 MB in float32) that are computed at once; more come in pieces, each computed again going back."""

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Logits (n, vocabulary) of outputs (n, d) of the last decoder layer."""


def rows_of(mask: torch.Tensor) -> torch.Tensor:
    """The batch row of each masked token; (tokens,) int64."""
    return mask.bool().nonzero()[:, 0]


def row_means(values: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Mean of each row's tokens, 0 for a row without any.

    Args:
        values: (tokens,).
        rows: (tokens,), each token's row.
        batch: Number of rows.

    Returns:
        (batch,) float32.
    """
    rows = rows.to(values.device)
    counts = torch.bincount(rows, minlength=batch).clamp(min=1)
    return values.new_zeros(batch, dtype=torch.float32).index_add(0, rows, values.float()) / counts


def mse_by_layer(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """MSE of each layer and triplet; squares in float32.

    Args:
        student: {layer name: (tokens, d)}.
        teacher: The same, in the same order of tokens.
        mask: (batch, seq), the tokens.

    Returns:
        {layer name: (batch,)}.
    """
    rows = rows_of(mask)
    return {
        name: row_means((hidden.float() - teacher[name].float()).square().mean(dim=-1), rows, mask.shape[0])
        for name, hidden in student.items()
    }


def scaled_mse(
    losses: Mapping[str, torch.Tensor],
    normalizer: Mapping[str, torch.Tensor] | None,
    how: str | None,
    adapter: torch.Tensor,
) -> torch.Tensor:
    """The layers' losses as one.

    Args:
        losses: {layer name: (batch,)}.
        normalizer: {layer name: (adapters,)}, each layer's loss without any edit; `None` to take the plain sum.
        how: "global" divides the sum by that of the normaliser; "layer" each layer by its own, then takes the mean.
        adapter: (batch,), whose triplet each is.

    Returns:
        (batch,), on the device of `adapter`.
    """
    values = torch.stack([loss.to(adapter.device) for loss in losses.values()])
    if normalizer is None:
        return values.sum(dim=0)
    scales = torch.stack([scale.to(adapter.device) for scale in normalizer.values()])[:, adapter]
    if how == "global":
        return values.sum(dim=0) / scales.sum(dim=0)
    # a layer where the prompt changes nothing has nothing to say
    counted = scales > 0
    return torch.where(counted, values / scales.clamp(min=1e-30), 0.0).sum(dim=0) / counted.sum(dim=0)


def response_targets(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What each masked token has to predict: the next token of y', or -100 where there is none.

    The first such prediction, of y'_1, is made at the last prompt token: the first one an edit can reach.

    Args:
        labels: (batch, seq), -100 outside y'.
        mask: (batch, seq), the masked tokens.

    Returns:
        (tokens,) int64.
    """
    return F.pad(labels[:, 1:], (0, 1), value=-100)[mask.bool()]


def likelihood_loss(
    predict: Predict, student: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Cross-entropy (nats) of the tokens of y', each predicted from the position before it.

    Args:
        predict: The model's head.
        student: (tokens, d), output of the last decoder layer at the masked tokens.
        targets: (tokens,), from `response_targets`.
        mask: (batch, seq), the masked tokens.
        vocabulary: Its size, which decides how many tokens are computed at once.

    Returns:
        (batch,).
    """

    def losses(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(predict(hidden).float(), tokens, reduction="none")

    seen = (targets != -100).to(student.device)
    tokens = targets.to(student.device)[seen]
    values = _in_pieces(losses, vocabulary, student[seen], tokens)
    return row_means(values, rows_of(mask).to(student.device)[seen], mask.shape[0])


def kl_loss(
    predict: Predict,
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    vocabulary: int,
    predict_prompted: Predict,
) -> torch.Tensor:
    """KL(prompted || steered) of the next-token distributions, nats a response token.

    Args:
        predict: The model's head.
        student: (tokens, d), output of the last decoder layer at the masked tokens.
        teacher: The same of the prompted model, without graph.
        targets: (tokens,), from `response_targets`: which positions predict y'.
        mask: (batch, seq), the masked tokens.
        vocabulary: Its size, which decides how many tokens are computed at once.
        predict_prompted: The head of the model as it was, without what `modules_to_save` trains of it.

    Returns:
        (batch,), each at least 0.
    """

    def divergences(hidden: torch.Tensor, prompted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = predict_prompted(prompted).float().log_softmax(dim=-1)
        got = predict(hidden).float().log_softmax(dim=-1)
        return F.kl_div(got, expected, reduction="none", log_target=True).sum(dim=-1)

    seen = (targets != -100).to(student.device)
    values = _in_pieces(divergences, vocabulary, student[seen], teacher.to(student.device)[seen])
    return row_means(values, rows_of(mask).to(student.device)[seen], mask.shape[0])


def _in_pieces(function: Callable[..., torch.Tensor], vocabulary: int, *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of equal slices of the tensors, put together."""
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(tensors[0]) <= size:
        return function(*tensors)
    pieces = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])
