"""The edit of one decoder layer, for every adapter on it.

For layer output h (batch, seq, d) and rank r:

    lambda = ReLU(h @ w + b)                            gate values (batch, seq, r)
    h  <-  h + (alpha + b_m) * m * (lambda @ z)         m: position mask (batch, seq)

Source: "Steer Like the LLM", arXiv 2605.03907. The gate reads the layer's own output, which in the all-layer variant
already carries the edits of earlier layers. Several active adapters read the same h and their edits add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_psr.base_model.decoder import hidden_of

from .call_state import SteeringState, Strength, check_row_count
from .config import PSRConfig
from .rows import BASE, EACH_ROW, RowAdapters


def add_edit(stream: torch.Tensor, gates: torch.Tensor, direction: torch.Tensor, strength: Strength) -> torch.Tensor:
    """`stream + strength * gates @ direction`, float32, in as few operations as there are.

    Args:
        stream: (..., d), any float dtype.
        gates: (..., r), float32.
        direction: (r, d), or (batch, r, d) for one a row.
        strength: Broadcasts over (..., r).
    """
    value = 1.0
    if isinstance(strength, torch.Tensor):
        gates = gates * strength
    else:
        value = strength
    if direction.shape[-2] == 1:  # an outer product
        return torch.addcmul(stream, gates, direction, value=value)
    if direction.dim() == 3 and stream.dtype is not torch.float64:
        return torch.baddbmm(stream.float(), gates, direction, alpha=value)
    # not one addmm over all rows: its result would be a view, which FSDP2 can't guard against writing in place
    return torch.add(stream, gates @ direction, alpha=value)


class PSRUnit(nn.Module):
    """One adapter's weights at one layer, float32 whatever the model's dtype.

    Attributes:
        gate_weight: w, (r, d); absent with a constant gate.
        gate_bias: b, (r,); absent with a constant gate.
        direction: z, (r, d).
    """

    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(self, width: int, r: int, gate: str, init_weights: bool) -> None:
        """Make the weights for a stream of `width` features and initialise them as `PSRConfig.init_weights` says."""
        super().__init__()
        self.direction = nn.Parameter(torch.empty(r, width, dtype=torch.float32))
        gated = gate == "relu"
        for name, shape in (("gate_weight", (r, width)), ("gate_bias", (r,))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)) if gated else None)
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool) -> None:
        """A no-op with open gates (`True`), or uniform within +-1/sqrt(d) as a linear layer starts (`False`).

        A no-op's first gate is open everywhere; further ones get a random w, for equal ranks would stay equal.
        """
        bound = self.direction.shape[1] ** -0.5
        if not init_weights:
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound)
            return
        self.direction.zero_()
        if self.gate_weight is not None and self.gate_bias is not None:
            self.gate_weight[:1].zero_()
            self.gate_weight[1:].uniform_(-bound, bound)
            self.gate_bias.fill_(1.0)

    def forward(
        self, hidden: torch.Tensor, stream: torch.Tensor, strength: Strength
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`stream` (..., d) with the edit that follows from `hidden` (..., d), and the gate values (..., r); float32.

        `strength` broadcasts over (..., r). The two streams differ where several adapters edit one after another.
        """
        weights: dict[str, Any] = self._parameters
        try:
            weight, bias, direction = weights["gate_weight"], weights["gate_bias"], weights["direction"]
        except KeyError:  # pruned, or made of others by a parametrization
            weight, bias, direction = self.gate_weight, self.gate_bias, self.direction
        if direction.dtype is not torch.float32:  # FSDP2's mixed precision hands the weights over in half precision
            direction = direction.float()
            weight, bias = (None, None) if weight is None or bias is None else (weight.float(), bias.float())
        if weight is None or bias is None:
            gates = hidden.new_ones(*hidden.shape[:-1], direction.shape[0], dtype=torch.float32)
        else:
            hidden = hidden if hidden.dtype is torch.float32 else hidden.float()
            if weight.shape[0] == 1 and torch.compiler.is_compiling():
                # a sum rather than a product of matrices: the compiler makes one kernel of it and what follows
                gates = ((hidden * weight).sum(dim=-1, keepdim=True) + bias).relu()
            else:
                gates = F.linear(hidden, weight, bias).relu()
        return add_edit(stream, gates, direction, strength), gates

    def gate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W (r, d) and b (r,); 0 and 1 for a constant gate, which is ReLU(h @ 0 + 1)."""
        if self.gate_weight is None or self.gate_bias is None:
            return torch.zeros_like(self.direction), torch.ones_like(self.direction[:, 0])
        return self.gate_weight, self.gate_bias

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Name the widths where weights are for a stream of another one."""
        width, given = self.direction.shape[1], state_dict.get(f"{prefix}direction")
        if given is not None and given.shape[-1] != width:
            message = (
                f"the adapter's weights are for a stream of {given.shape[-1]} features, and the model's has {width}"
            )
            if message not in error_msgs:
                error_msgs.append(message)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but not to another dtype: the edit is computed in float32."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if tensor.is_meta or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class PSRLayer(nn.Module, BaseTunerLayer):
    """Child module `psr` of a decoder layer; holds all adapters' units and edits the layer's output in a hook.

    Args:
        name: The decoder layer's name in the model.
        width: d, last dimension of the layer's output.
        device: Where the decoder layer lives, or `None` if it has no parameters.
        state: What the current forward call is to do, shared by the model's PSR layers.

    Attributes:
        hook: Removes the hook on the decoder layer; `PSRModel` sets it.
    """

    adapter_layer_names = ("psr_unit",)
    other_param_names = ("config",)
    hook: RemovableHandle

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
        """Add the adapter `adapter_name`, or make it anew.

        Raises:
            ValueError: the name stands for something else.
        """
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

    def reset_psr_parameters(self, adapter_name: str) -> None:
        """Initialise the adapter's weights again, as its configuration says."""
        if adapter_name in self.psr_unit:
            self.unit(adapter_name).reset_parameters(self.config[adapter_name].init_weights)

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
