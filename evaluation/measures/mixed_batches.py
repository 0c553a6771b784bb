"""PSR adapters of several traits on one model, for mixed batches: each row has its own adapter and strength."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel

from peft_psr import PSRConfig

from .adapters.registry import find_kind


@dataclass(frozen=True)
class AdapterCopy:
    """A PSR adapter off its model: its weights are {key as in `adapter_model.safetensors`: float32, on the CPU}."""

    config: PSRConfig
    weights: dict[str, torch.Tensor]


def copy_adapter(model: PeftModel) -> AdapterCopy | None:
    """The active adapter, to be put on the base model again; `None` if it is no PSR adapter or not the only one."""
    kind = find_kind(model)
    if kind is None or not kind.mixed or len(model.active_adapters) != 1:
        return None
    name = model.active_adapters[0]
    weights = get_peft_model_state_dict(model, adapter_name=name)
    return AdapterCopy(
        copy.deepcopy(cast(PSRConfig, model.peft_config[name])),
        {key: weight.detach().cpu().clone() for key, weight in weights.items()},
    )


@contextmanager
def together(model: PreTrainedModel, adapters: Mapping[str, AdapterCopy]) -> Iterator[PeftModel]:
    """The base model with all of these adapters, {name without a dot: adapter}, in eval mode; taken off it at the end.

    `ValueError` if one does not fit the model.
    """
    steered: PeftModel | None = None
    try:
        for name, adapter in adapters.items():
            config = copy.deepcopy(adapter.config)
            config.inference_mode = True
            if steered is None:
                steered = cast(PeftModel, get_peft_model(model, config, adapter_name=name))
            else:
                steered.add_adapter(name, config)
            found: Any = set_peft_model_state_dict(steered, dict(adapter.weights), adapter_name=name)
            if found.unexpected_keys:
                raise ValueError(f"Adapter {name!r} does not fit the model, which has no {found.unexpected_keys[0]}.")
        yield cast(PeftModel, cast(PeftModel, steered).eval())
    finally:
        if steered is not None:
            steered.unload()
