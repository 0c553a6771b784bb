"""PEFT's LoRA: one strength for the model, as a factor of what it adds to weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from .kind import AdapterKind


class LoRAKind(AdapterKind):
    """Plain LoRAs."""

    @contextmanager
    def at_strength(self, model: PeftModel, alpha: float) -> Iterator[None]:
        """Scales what they add to weights; `ValueError` if one does more than that, or has been merged."""
        layers = _scalable_layers(model)
        scalings = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                for name in layer.active_adapters:
                    layer.set_scale(name, alpha)
            yield
        finally:
            for layer, scaling in zip(layers, scalings, strict=True):
                layer.scaling.update(scaling)


def _scalable_layers(model: PeftModel) -> list[LoraLayer]:
    """All LoRA layers, if scaling them scales all that the active adapters do."""
    layers: list[LoraLayer] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is merged into the weights, where its strength can't be set; `unmerge_adapter()`.")
    for name in model.active_adapters:
        config = cast(LoraConfig, model.peft_config[name])
        parts = {part: getattr(config, part) for part in ("modules_to_save", "trainable_token_indices")}
        parts["bias"] = None if config.bias == "none" else config.bias
        variants = {type(layer.lora_variant[name]).__name__ for layer in layers if name in layer.lora_variant}
        parts["variant"] = ", ".join(variants)
        unscaled = ", ".join(f"{part}={value!r}" for part, value in parts.items() if value)
        if unscaled:
            raise ValueError(
                f"LoRA adapter {name!r} has {unscaled}, which does not scale with alpha. Only a plain LoRA, which "
                "adds alpha * B A to weights, has a strength."
            )
    return layers


LORA = LoRAKind()
