"""Which adapters may train, and how the triplets of several share batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from peft_psr.config import PSRConfig
from peft_psr.model import PSRModel
from peft_psr.training.data.dataset import Row

from .arguments import PSRTrainingArguments


def check_adapters(tuner: PSRModel, names: Sequence[str], args: PSRTrainingArguments) -> None:
    """Check that adapters can be trained together.

    Raises:
        ValueError: one does not exist, they edit other layers or differ in `r` or gate, or there are several
            processes.
    """
    known = [name for name in tuner.peft_config]
    if not names:
        raise ValueError("train_dataset is an empty mapping: name at least one adapter.")
    for name in names:
        if name not in known:
            raise ValueError(
                f"train_dataset names adapter {name!r}, which the model lacks; it has {', '.join(known)}."
            )
    configs = {name: cast(PSRConfig, tuner.peft_config[name]) for name in names}
    shapes = {
        name: (
            configs[name].r,
            configs[name].gate,
            [layer.name for layer in tuner.psr_layers().values() if name in layer.psr_unit],
        )
        for name in names
    }
    saving = [name for name in names if configs[name].modules_to_save]
    if saving and len(names) > 1:
        raise ValueError(
            f"Adapters with modules_to_save ({', '.join(saving)}) can't train together: one at a time can use those "
            "modules. Train them one after the other."
        )
    for name, shape in shapes.items():
        if shape != shapes[names[0]]:
            raise ValueError(
                f"Adapters that train together edit the same layers with the same r and gate; {names[0]!r} has "
                f"{shapes[names[0]]}, {name!r} has {shape}. Train them one after the other."
            )
    if args.world_size > 1:
        raise ValueError(
            f"Several adapters train together in one process, here are {args.world_size}. Give each process its own "
            "adapters, or train them one after the other."
        )


def check_directions(tuner: PSRModel, names: Sequence[str]) -> None:
    """Check that adapters with frozen directions have some.

    Raises:
        ValueError: all of an adapter's directions are 0, where its gates have nothing to do.
    """
    for name in names:
        units = [layer.unit(name) for layer in tuner.psr_layers().values() if name in layer.psr_unit]
        frozen = cast(PSRConfig, tuner.peft_config[name]).freeze_directions
        if frozen and not any(unit.direction.is_meta or unit.direction.any() for unit in units):
            raise ValueError(
                f"Adapter {name!r} has freeze_directions=True and directions that are all 0, so nothing can be "
                "learned. Set them first: `initialize_psr_weights(model, triplets, directions=...)`."
            )


def clip_each(tuner: PSRModel, names: Sequence[str], max_norm: float) -> torch.Tensor:
    """Clip the gradients of each adapter by themselves, as if it were alone.

    Args:
        tuner: The model's tuner.
        names: The adapters that are trained.
        max_norm: Largest norm of one adapter's gradients.

    Returns:
        (), the norm of all gradients before.
    """
    layers = tuner.psr_layers().values()
    norms = [
        torch.nn.utils.clip_grad_norm_(
            [weight for layer in layers if name in layer.psr_unit for weight in layer.unit(name).parameters()],
            max_norm,
        )
        for name in names
    ]
    return torch.stack(norms).norm()


def in_turn(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One item for the first rows of all adapters, one for their second rows, and so on.

    A batch of n items is then a batch of n triplets for each adapter, and an epoch is one pass over each adapter's
    triplets. Adapters with fewer triplets are missing from the last items.
    """
    by_adapter: dict[int, list[Row]] = {}
    for row in rows:
        by_adapter.setdefault(row["adapter"], []).append(row)
    items = []
    for i in range(max(map(len, by_adapter.values()))):
        group = [own[i] for own in by_adapter.values() if i < len(own)]
        # Trainer's grouping by length looks at `input_ids`
        items.append({"rows": group, "input_ids": max((row["input_ids"] for row in group), key=len)})
    return items
