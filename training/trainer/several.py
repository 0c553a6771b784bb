"""How several adapters train at once: their triplets share batches, their gradients are clipped apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from peft_psr.model import PSRModel
from peft_psr.training.data.dataset import Row


def clip_each(tuner: PSRModel, names: Sequence[str], max_norm: float) -> torch.Tensor:
    """Clip each adapter's gradients to `max_norm` as if it were alone; returns the norm of all before, ()."""
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


def load_adapters(model: PeftModel, names: Sequence[str], folder: str) -> None:
    """Set the weights of adapters by name to those of a checkpoint folder, laid out as PEFT's `save_pretrained` does.

    Raises:
        FileNotFoundError: the checkpoint lacks one of them.
    """
    for name in names:
        path = Path(folder) if name == "default" else Path(folder) / name
        if not (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of this run: {path} holds no adapter.")
        set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"), adapter_name=name)
