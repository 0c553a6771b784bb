"""The kinds of adapters that can be measured, by PEFT's name of their type."""

import torch
from peft import PeftModel

from peft_psr.registry import Registry

from .kind import AdapterKind


ADAPTER_KINDS: Registry[AdapterKind] = Registry(
    "kind of adapter", {"PSR": f"{__package__}.psr:PSR", "LORA": f"{__package__}.lora:LORA"}
)
"""By a model's `peft_type`."""


def find_kind(model: torch.nn.Module) -> AdapterKind | None:
    """The kind of a model's adapters; `None` if it has none, or of no kind that is known."""
    name = model.peft_type if isinstance(model, PeftModel) else None  # a string and an enum's member at once
    return None if name is None or name not in ADAPTER_KINDS else ADAPTER_KINDS[name]


def kind_of(model: torch.nn.Module) -> AdapterKind:
    """The kind of a model's adapters; `TypeError` if it has none, or of a kind without a strength."""
    kind = find_kind(model)
    if kind is None:
        found = type(model.base_model if isinstance(model, PeftModel) else model).__name__
        raise TypeError(f"Only a PEFT model with a PSR or a LoRA adapter has a strength alpha, got {found}.")
    return kind
