"""What an objective's loss at each layer is before any training, which `normalize_loss` divides by."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from peft_psr.training.data.collator import Batch
from peft_psr.training.passes.branches import run_branch
from peft_psr.training.passes.frozen import FrozenModel

from .objective import Objective, Passes


def untrained_loss(
    objective: Objective,
    frozen: FrozenModel,
    layers: Sequence[str],
    batches: Iterable[Batch],
    adapters: Sequence[str],
    gather: Callable[[torch.Tensor], Any],
) -> dict[str, torch.Tensor]:
    """{layer: (adapters,)}: an objective's mean loss at `layers` without any edit; neutral triplets do not count.

    An adapter without a name, for errors, is the only one. `gather` makes all processes' values, row by row, of this
    one's.

    Raises:
        ValueError: the instruction changes nothing on any triplet of an adapter.
    """
    parts: list[torch.Tensor] = []
    owners: list[torch.Tensor] = []
    for batch in batches:
        teacher = frozen.teacher(batch)
        base = run_branch(frozen.model, batch, layers, "base")
        losses = objective.loss(Passes(frozen.model, batch, layers, base, teacher, adapters))
        assert isinstance(losses, dict)  # as "all" layers promise
        by_triplet = torch.stack([loss.to(batch["index"].device) for loss in losses.values()], dim=1)
        owner = torch.where(batch["neutral"], -1, batch["adapter"])
        parts += gather(by_triplet)
        owners += gather(owner)
    by_triplet, owner = torch.stack(parts), torch.stack(owners)
    means = torch.stack([by_triplet[owner == i].mean(dim=0) for i in range(len(adapters))])
    for name, mean in zip(adapters, means, strict=True):
        if not mean.nan_to_num().any():
            raise ValueError(
                "The instruction changes nothing inside the model on any triplet"
                + (f" of {name!r}" if name else "")
                + " (its activations are equal with and without it), so the loss can't be normalised and there is "
                "nothing to learn."
            )
    return dict(zip(layers, means.T, strict=True))
