"""Whether a saved adapter fits the model that it is loaded onto: PEFT and transformers drop what finds no place."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from peft_psr.config import PSRConfig, PSRWarning


KEY_PREFIX = "base_model.model."
KEY_OF_UNIT = ".psr.psr_unit."


class CheckedLoad:
    """The `_load_pretrained_model` of a model with PSR layers: transformers' `load_adapter` reads weights by it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load, and see what was left out; raises as `report_fit`."""
        result = type(self.model)._load_pretrained_model(*args, **kwargs)  # type: ignore[attr-defined]
        configs: dict[str, PeftConfig] = self.model.peft_config  # type: ignore[assignment]
        name, config = next(reversed(configs.items()))  # the one just added
        if isinstance(config, PSRConfig):
            marker = f"{KEY_OF_UNIT}{name}."
            report_fit(
                self.model,
                name,
                lost=result[0].unexpected_keys,
                bare=[key for key in result[0].missing_keys if marker in key],
                loaded=[key for key in self.model.state_dict() if marker in key and key not in result[0].missing_keys],
            )
        return result


def saved_key(key: str) -> str:
    """The name that a weight has in an adapter's file: without the prefix of another `PeftModel` beneath."""
    return f"{KEY_PREFIX}{_bare(key)}" if key.startswith(KEY_PREFIX) else key


def place_weights(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's weights by the names of their places in the model, where another `PeftModel` may lie beneath."""
    place = next((key for key in model.state_dict() if KEY_OF_UNIT in key), "")
    prefix = place.removesuffix(_bare(place))
    if not prefix:
        return dict(weights)
    return {prefix + _bare(key) if KEY_OF_UNIT in key else key: weight for key, weight in weights.items()}


def _bare(key: str) -> str:
    while key.startswith(KEY_PREFIX):
        key = key.removeprefix(KEY_PREFIX)
    return key


def check_fit(model: nn.Module, adapter_name: str, keys: Iterable[str]) -> None:
    """As `report_fit`, of weights yet to be loaded, whose `keys` have the adapter's name in them."""
    places = {key.removeprefix(KEY_PREFIX) for key in model.state_dict()}
    given = {key.removeprefix(KEY_PREFIX) for key in keys}
    if not given:  # a process of several that only receives
        return
    own = {key for key in places if f"{KEY_OF_UNIT}{adapter_name}." in key}
    report_fit(model, adapter_name, lost=given - places, bare=own - given, loaded=own & given)


def report_fit(
    model: nn.Module, adapter_name: str, lost: Collection[str], bare: Collection[str], loaded: Collection[str]
) -> None:
    """Warn of what of an adapter was left out, if anything was; raise `ValueError` if nothing was loaded.

    Args:
        model: A `PeftModel`, or a bare model with PSR layers.
        adapter_name: The adapter's name there.
        lost: Keys of the adapter's weights that have no place in the model.
        bare: Keys of the model's weights for the adapter that it has none for.
        loaded: Those that it has some for.
    """
    if not lost and not bare:
        return
    get_base_model = getattr(model, "get_base_model", None)
    kind = type(model if get_base_model is None else get_base_model()).__name__
    if not loaded:
        raise ValueError(
            f"Adapter {adapter_name!r} does not fit the model, a {kind}: none of its weights has a place there. "
            f"They are for {_modules(lost) or 'nothing'}, and the model's layers are {_modules(bare)}. Load it onto a "
            "model of the class and the depth that it was trained on."
        )
    parts = []
    if lost:
        parts.append(f"its weights for {_modules(lost)} have no place there and are left out")
    if bare:
        parts.append(f"it has no weights for {_modules(bare)}, which keep what they began with")
    message = f"Adapter {adapter_name!r} does not fit the model, a {kind}, as a whole: {'; '.join(parts)}."
    warnings.warn(message, PSRWarning, stacklevel=4)  # said to the caller of PEFT's or transformers' own loading


def _modules(keys: Iterable[str]) -> str:
    """Names of the modules that keys belong to, the first eight of them."""
    names = {key.removeprefix(KEY_PREFIX).partition(KEY_OF_UNIT)[0] for key in keys}
    ordered = sorted(names, key=lambda name: [part.zfill(6) for part in name.split(".")])  # numbers by size
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return ", ".join(ordered[:8]) + more
