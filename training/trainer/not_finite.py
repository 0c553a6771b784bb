"""Finds where a loss that is infinite or not a number comes from."""

import torch

from peft_psr.base_model.decoder import layer_index
from peft_psr.training.objectives.losses import Losses
from peft_psr.training.objectives.objective import Passes
from peft_psr.training.objectives.tokens import rows_of


def not_finite(losses: Losses, passes: Passes) -> tuple[int, str]:
    """The first place that is not finite: the prompted model, the steered one, or what was computed from the two.

    Returns:
        The triplet's `index`, and words for an error: "the steered model's activations at layer 3 are".
    """
    index, rows = passes.batch["index"], rows_of(passes.mask)
    for whose, hidden in (("prompted", passes.teacher), ("steered", passes.student.hidden)):
        for name, values in hidden.items():
            bad = ~torch.isfinite(values).all(dim=-1)
            if bad.any():
                row = rows[bad.to(rows.device)][0]
                return int(index[row]), f"the {whose} model's activations at layer {layer_index(name)} are"
    named = {f"{name!r} at layer {layer}": loss for name, layer, loss in losses.of_layers()}
    for what, values in (named | {repr(name): loss for name, loss in losses.parts.items()}).items():
        bad = ~torch.isfinite(values)
        if bad.any():
            return int(index[int(bad.nonzero()[0])]), f"the loss of objective {what} is"
    return int(index[0]), "the sum of the losses is"
