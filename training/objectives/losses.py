"""A batch's loss, part by part: the objectives and penalties with their weights, as one number a triplet."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from peft_psr.base_model.decoder import layer_index

from .objective import Objective, Passes
from .penalties import PENALTIES
from .tokens import rows_of


@dataclass
class Losses:
    """The parts of a batch's loss."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)  # {objective or penalty: (batch,)}
    # {objective: {layer name: (batch,)}}, of those that have a loss at each layer; not scaled
    by_layer: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def weighted(self, weights: Mapping[str, float], device: torch.device) -> torch.Tensor:
        """The weighted sum of the parts, (batch,)."""
        return torch.stack([weights[name] * part.to(device) for name, part in self.parts.items()]).sum(dim=0)

    def of_layers(self) -> Iterator[tuple[str, int | str, torch.Tensor]]:
        """Yields objective, number of the layer, loss (batch,)."""
        for objective, losses in self.by_layer.items():
            for name, loss in losses.items():
                yield objective, layer_index(name), loss


def losses_of(
    passes: Passes,
    objectives: Mapping[str, Objective],
    penalties: Mapping[str, float],
    normalizers: Mapping[str, Mapping[str, torch.Tensor]],
    how: str | None,
) -> Losses:
    """All parts of a batch's loss; penalties, {name: weight}, of weight 0 are left out.

    `normalizers` are {objective: {layer name: (adapters,)}}, each layer's loss without any edit, where it is scaled,
    and `how` is as in `scaled`.
    """
    losses = Losses()
    for name, objective in objectives.items():
        loss = objective.loss(passes)
        if isinstance(loss, dict):
            losses.by_layer[name] = loss
            loss = scaled(loss, normalizers.get(name), how, passes.batch["adapter"])
        losses.parts[name] = loss
    losses.parts |= {name: PENALTIES[name](passes) for name, weight in penalties.items() if weight}
    return losses


def scaled(
    losses: Mapping[str, torch.Tensor],
    normalizer: Mapping[str, torch.Tensor] | None,
    how: str | None,
    adapter: torch.Tensor,
) -> torch.Tensor:
    """The layers' losses, {layer name: (batch,)}, as one, (batch,) on the device of `adapter`, whose triplet each is.

    The normaliser is {layer name: (adapters,)}, each layer's loss without any edit; without one it is the plain sum.
    `how`
    "global" divides the sum by that of the normaliser; "layer" each layer by its own, then takes the mean.
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


def not_finite(losses: Losses, passes: Passes) -> tuple[int, str]:
    """The first triplet's `index` that is not finite, and where, in words for an error.

    Such as "the steered model's activations at layer 3 are"; else the prompted model's, or what came of the two.
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
