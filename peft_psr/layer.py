"""The edits of one decoder layer, by every adapter on it (the equation: `unit`).

The gate reads the layer's own output, which in the all-layer variant already carries the edits of earlier layers.
Several active adapters read the same output and their edits add up.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_psr.base_model.decoder import hidden_of, layer_index

from .call_state import SteeringState, Strength, check_row_count
from .config import PSRConfig
from .rows import BASE, EACH_ROW, RowAdapters
from .unit import PSRUnit, add_edit


class PSRLayer(nn.Module, BaseTunerLayer):
    """Child module `psr` of a decoder layer; holds all adapters' units and edits the layer's output in a hook.

    Args:
        name: The decoder layer's name in the model.
        width: d, last dimension of the layer's output.
        device: Where the decoder layer lives, or `None` if it has no parameters.
        state: What the current forward call is to do, shared by the model's PSR layers.
    """

    adapter_layer_names = ("psr_unit",)
    other_param_names = ("config",)
    hook: RemovableHandle  # of the hook on the decoder layer; `PSRModel` sets it

    def __init__(self, name: str, width: int, device: torch.device | None, state: SteeringState) -> None:
        super().__init__()
        self.name, self.width, self.state = name, width, state
        self.in_features = self.out_features = width
        self.base_device = device
        self.psr_unit = nn.ModuleDict()
        self.rows: RowAdapters | None = None
        self.config: dict[str, PSRConfig] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    # PEFT looks for these on the module that a tuner layer wraps; a decoder layer has neither.
    weight = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        return self.base_device, None

    def update_layer(self, adapter_name: str, config: PSRConfig, inference_mode: bool = False) -> None:
        """Add the adapter `adapter_name`, or make it anew; `ValueError` for a name that stands for something else."""
        if adapter_name in (BASE, EACH_ROW):
            raise ValueError(f"An adapter can't be called {adapter_name!r}, which has a meaning of its own.")
        no_op = config.init_weights or config.inference_mode  # what is not trained any more is read from a file
        self.psr_unit[adapter_name] = PSRUnit(self.width, config.r, config.gate, no_op)
        self.configure(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def configure(self, adapter_name: str, config: PSRConfig) -> None:
        """Give an adapter its configuration, or another one of the same rank and gate."""
        self.config[adapter_name] = config
        self.state.positions.add(config.positions)
        self.state.forget()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; what of them is trainable, as `BaseTunerLayer` says and their configurations."""
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_directions()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or not, but for directions that their configurations freeze."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_directions()

    def _freeze_directions(self) -> None:
        # PEFT goes over the parameters of a unit one by one, so that the unit itself has no say
        for name, config in self.config.items():
            if config.freeze_directions and name in self.psr_unit:
                self.unit(name).direction.requires_grad_(False)

    def unit(self, adapter_name: str) -> PSRUnit:
        """The adapter's weights."""
        return self.psr_unit[adapter_name]  # type: ignore[return-value]

    def strength(self, adapter_name: str, hidden: torch.Tensor) -> Strength:
        """`scale * (alpha + b_m) * m`: a number, or a float32 tensor that broadcasts over (batch, seq, r)."""
        config, state = self.config[adapter_name], self.state
        alpha = config.alpha if state.alpha is None else _for_rows(state.alpha, hidden.shape[0])
        strength: Strength = state.scale * (alpha + config.coefficient_bias)
        if state.masks.get(config.positions) is None:
            return strength
        return strength * self.mask(config.positions, hidden)  # type: ignore[operator]

    def mask(self, positions: str, hidden: torch.Tensor) -> torch.Tensor | None:
        """The current call's mask as float32 (batch, seq, 1), or `None` to edit every token."""
        mask = self.state.masks.get(positions)
        if mask is None:
            return None
        if mask.numel() * hidden.shape[-1] != hidden.numel():
            raise ValueError(
                f"{self.name!r} returned {tuple(hidden.shape)} for {tuple(mask.shape)} tokens, so the steering mask "
                "can't be applied to it. Edit another module, or use positions='all' without padding."
            )
        return mask.to(hidden.device, torch.float32).view(*hidden.shape[:-1], 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The edited stream (batch, seq, d), in the dtype of `hidden`; `hidden` itself where nothing is to be done.

        A module may see its tokens as rows: (batch * seq, d).
        """
        state = self.state
        if self._disable_adapters:
            return hidden
        # compiled, it would be compiled anew for each strength
        known = None if torch.compiler.is_compiling() else state.recall(self._active_adapter, hidden)
        if known is not None:
            unit = self._modules["psr_unit"]._modules.get(known[0])  # type: ignore[union-attr]
            if unit is None:
                return hidden
            # not by its `__call__`: its only hooks are accelerate's, which take the place of `forward`
            stream, gates = unit.forward(hidden, hidden, known[1])
            if gates.dtype is torch.float32:  # else in autocast, which is slow to ask for
                return stream if stream.dtype is hidden.dtype else stream.to(hidden.dtype)
        if hidden.dim() == 2:
            return self.forward(hidden[:, None])[:, 0]
        if torch.is_autocast_enabled(hidden.device.type):
            with torch.autocast(hidden.device.type, enabled=False):
                stream = self._edit(hidden)
            state.forget()
            return stream
        return self._edit(hidden)

    def _edit(self, hidden: torch.Tensor) -> torch.Tensor:
        """The edited stream, all cases; leaves in the state what further layers need not work out again."""
        state = self.state
        if state.adapter_names is not None:
            return self._edit_rows(hidden, state.adapter_names)
        stream, active = hidden, self.active_adapters
        for name in active:
            if name not in self.psr_unit:
                continue
            strength = self.strength(name, hidden)
            stream, gates = self.unit(name).forward(hidden, stream, strength)
            if state.gates is not None:
                state.gates[self.name, name] = gates
            elif len(active) == 1 and self.config[name].gate == "relu" and not torch.compiler.is_compiling():
                state.remember(self._active_adapter, name, strength)
        return stream if stream.dtype is hidden.dtype else stream.to(hidden.dtype)

    def _edit_rows(self, hidden: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Each row edited by its own adapter."""
        check_row_count(names, hidden.shape[0], repeated=True, where=f" at {self.name!r}")
        state = self.state
        if self.rows is None:
            return hidden
        rows = self.rows.repeat(hidden.shape[0] // len(names))
        alpha = rows.alpha if state.alpha is None else _for_rows(state.alpha, hidden.shape[0])
        strength = state.scale * (alpha + rows.coefficient_bias)
        chosen: torch.Tensor | float = 0.0
        for kind, using in rows.positions.items():
            mask = self.mask(kind, hidden)
            chosen = chosen + (using if mask is None else using * mask)
        gates = rows.gates(hidden)
        if state.gates is not None:
            state.gates[self.name, EACH_ROW] = gates
        return add_edit(hidden, gates, rows.direction, strength * chosen).to(hidden.dtype)

    def extra_repr(self) -> str:
        """Name and width, for printing."""
        return f"{self.name}, width={self.width}"


def layers_of(model: nn.Module) -> dict[int | str, PSRLayer]:
    """A model's PSR layers by number of the decoder layer, or by name where numbers won't do, in model order."""
    layers = [module for module in model.modules() if isinstance(module, PSRLayer)]
    numbers = [layer_index(layer.name) for layer in layers]
    unique = len(set(numbers)) == len(numbers)
    return {number if unique else layer.name: layer for number, layer in zip(numbers, layers, strict=True)}


def check_weights_at_hand(layers: Iterable[PSRLayer], what: str) -> None:
    """Raise `ValueError` if accelerate keeps weights that `what` needs elsewhere between calls."""
    for layer in layers:
        if any(parameter.is_meta for parameter in layer.psr_unit.parameters()):
            raise ValueError(
                f"{what} needs the adapters' weights at hand, and those of {layer.name!r} are offloaded. Load the "
                "model without offloading its edited layers."
            )


def _for_rows(alpha: Strength, rows: int) -> Strength:
    """One strength a row of the batch, (batch, 1, 1), repeated for a module that sees its tokens as rows."""
    if not isinstance(alpha, torch.Tensor) or alpha.dim() == 0 or alpha.shape[0] == rows:
        return alpha
    return alpha.repeat_interleave(rows // alpha.shape[0], dim=0)


def edit_output(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a decoder layer, first in line, so that every later hook sees the edited stream.

    In decoding each layer streams megabytes of weights through the processor's caches, so all that Python looks up is
    cold: hence plain dictionaries and few calls from here to the edit.
    """
    layer: PSRLayer = module._modules["psr"]  # type: ignore[assignment]
    if isinstance(output, torch.Tensor):
        return layer.forward(output)
    return (layer.forward(hidden_of(output, layer.name)), *output[1:])
