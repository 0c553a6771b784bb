"""Which modules a PSR adapter edits: helpers of `PSRModel` for PEFT's matching of names."""

from collections.abc import Sequence

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peft_psr.config import PSRConfig

from .decoder import decoder_layer_names, is_encoder_decoder


def layers_to_edit(config: PSRConfig, model: nn.Module) -> set[str]:
    """Names of the decoder layers to edit, none where `target_modules` names others.

    Raises `ValueError` if there is no such layer, or a module to edit lies in an encoder.
    """
    if config.target_modules is not None:
        keys = [key for key, _ in model.named_modules() if check_target_module_exists(config, key)]
        check_not_in_encoder(model, keys)
        return set()
    names = decoder_layer_names(model, config.layers_pattern)
    wanted = config.layers_to_transform
    layers = range(len(names)) if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    if beyond := [layer for layer in layers if layer >= len(names)]:
        raise ValueError(
            f"layers_to_transform asks for layer {beyond[0]}, but {type(model).__name__} has {len(names)} decoder "
            f"layers: 0 to {len(names) - 1}."
        )
    found = {names[layer] for layer in layers}
    check_not_in_encoder(model, sorted(found))
    return found


def check_not_in_encoder(model: nn.Module, keys: Sequence[str]) -> None:
    """Raise `ValueError` if a module lies in the encoder of an encoder-decoder, whose tokens no mask is for."""
    if not is_encoder_decoder(model):
        return
    inside = set(model.get_encoder().modules())  # type: ignore[operator]
    found = next((key for key in keys if model.get_submodule(key) in inside), None)
    if found is not None:
        raise ValueError(
            f"{found!r} lies in the encoder of {type(model).__name__}; an encoder-decoder is edited in its decoder. "
            "Name modules of the decoder, by a pattern such as target_modules=r'.*decoder.*wo'."
        )


class ExactTarget:
    """A view of a config for PEFT's matching in which one module is the target, whatever its index."""

    layers_to_transform = None
    target_parameters = None

    def __init__(self, config: PSRConfig, key: str) -> None:
        self.target_modules = {key}
        self.exclude_modules = config.exclude_modules
        self.modules_to_save = config.modules_to_save
