"""Adapters of other types on a model that PSR edits, a LoRA beneath it for one: told from PSR's, and left alone.

PEFT goes over every adapter of a model when one is made active, enabled or made trainable, and tells them by their
names alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_psr.config import PSRConfig


def configs_beneath(model: nn.Module, given: Any) -> dict[str, Any]:
    """The configurations that a model has, of other types than PSR, as a `PeftModel` is put over it; else none.

    PEFT would enter PSR's among them, over one of the same name: what the other `PeftModel` saved would be PSR's.
    A tuner is `given` configurations by name in a `PeftModel`; a bare model, of one table, gives one alone.
    """
    theirs = getattr(model, "peft_config", None) or {}
    ours = any(isinstance(config, PSRConfig) for config in theirs.values())
    return theirs if isinstance(given, Mapping) and not ours else {}


def saved_modules(model: nn.Module, configs: Sequence[PSRConfig]) -> dict[str, AuxiliaryTrainingWrapper]:
    """{name: module} of `modules_to_save` of PSR adapters, of which PEFT keeps a copy for each adapter."""
    ends = tuple(end for config in configs for end in config.modules_to_save or ())
    return {name: module for name, module in _wrappers(model).items() if name.endswith(ends)}


def _wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


def check_no_shared_modules(
    model: nn.Module, adapter_name: str, config: PSRConfig, present: Sequence[PSRConfig]
) -> None:
    """Raise `ValueError` if a PSR adapter to be added could not be told from one of another type in modules of both.

    `present` are the configurations of the PSR adapters that the model has.
    """
    own = saved_modules(model, present)
    ends = tuple(config.modules_to_save or ())
    for name, module in _wrappers(model).items():
        if name in own:
            continue
        if name.endswith(ends):
            raise ValueError(
                f"modules_to_save names {name!r}, of which an adapter of another type has trained a copy already. "
                "Merge that adapter into the model first (`merge_and_unload`), or leave the module out."
            )
        if adapter_name in module._adapters:
            raise ValueError(
                f"An adapter of another type that is called {adapter_name!r} too has its own copy of {name!r}, which "
                "would be saved as PSR's. Give the PSR adapter another name (`adapter_name=`)."
            )


def freeze_others(model: nn.Module, own: Sequence[nn.Module]) -> None:
    """Take the gradient from every parameter that is in none of PSR's modules `own`."""
    kept = {id(parameter) for module in own for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


@contextmanager
def switched_off(modules: Sequence[Any]) -> Iterator[None]:
    """Inside, none of these modules of PEFT's does anything; they do afterwards if they did before."""
    before = [module._disable_adapters for module in modules]
    for module in modules:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module._disable_adapters = disabled


@contextmanager
def others_left_alone(model: nn.Module, own: Sequence[nn.Module]) -> Iterator[None]:
    """Adapters of other types, in none of PSR's modules `own`, are as active and trainable afterwards as before."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    mine = {id(module) for module in own}
    others = [module for module in model.modules() if isinstance(module, kinds) and id(module) not in mine]
    active = [module._active_adapter for module in others]
    trainable = [(parameter, parameter.requires_grad) for module in others for parameter in module.parameters()]
    try:
        yield
    finally:
        for module, names in zip(others, active, strict=True):
            module._active_adapter = names
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
