"""Finds where a loss that is infinite or not a number comes from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_psr.base_model.decoder import layer_index
from peft_psr.training.objectives.losses import rows_of
from peft_psr.training.passes.branches import Batch


def not_finite(
    parts: Mapping[str, torch.Tensor],
    by_layer: Mapping[str, torch.Tensor],
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    batch: Batch,
) -> tuple[int, str]:
    """The first place that is not finite: the prompted model, the steered one, or what was computed from the two.

    Args:
        parts: {name: (batch,)}, the parts of the loss.
        by_layer: {layer name: (batch,)}, the MSE of each layer.
        student: {layer name: (tokens, d)} of the steered model.
        teacher: The same of the prompted model.
        batch: The batch.

    Returns:
        The triplet's `index`, and words for an error: "the steered model's activations at layer 3 are".
    """
    rows = rows_of(batch["steering_mask"])
    for whose, hidden in (("prompted", teacher), ("steered", student)):
        for name, values in hidden.items():
            bad = ~torch.isfinite(values).all(dim=-1)
            if bad.any():
                row = rows[bad.to(rows.device)][0]
                return int(batch["index"][row]), f"the {whose} model's activations at layer {layer_index(name)} are"
    layers = {f"'mse' at layer {layer_index(name)}": loss for name, loss in by_layer.items()}
    for name, values in {**layers, **{repr(name): loss for name, loss in parts.items()}}.items():
        bad = ~torch.isfinite(values)
        if bad.any():
            return int(batch["index"][int(bad.nonzero()[0])]), f"the loss of objective {name} is"
    return int(batch["index"][0]), "the sum of the losses is"
