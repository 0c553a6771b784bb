"""`PSRModel`: where PSR layers go in a model, and what a caller can ask of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_psr.base_model import other_adapters
from peft_psr.base_model.decoder import output_width
from peft_psr.base_model.fit import KEY_OF_UNIT, check_fit, place_weights, saved_key
from peft_psr.base_model.targets import ExactTarget, layers_to_edit

from .combination.concatenation import check_combination, check_weights, combine
from .combination.rank_cut import cut_adapter
from .config import PSRConfig, check_strength
from .hooks import attach_state, check_names, detach_state, prompt_of, rows_named
from .layer import PSRLayer, check_weights_at_hand, edit_output, layers_of


class PSRModel(BaseTuner):
    """PEFT's tuner for Prompt Steering Replacement; `get_peft_model(model, PSRConfig(...))` makes one.

    A small module `psr` becomes a child of every edited decoder layer and a forward hook applies it, so the
    model keeps its classes and its keys. The model's own `forward` and `generate` then take two more arguments:

    - `steering_mask`, (batch, seq) of 0/1: the tokens to edit, in `generate` those of the prompt. Without it
      `PSRConfig.positions` decides. In an encoder-decoder, seq counts the decoder's tokens.
    - `alpha`: strength for this call in place of the adapters' own; a number, or one per row.

    Several adapters may be active (`model.base_model.set_adapter([...])`). On one layer they read the same stream and
    their edits add up, in any order; on the layers after it each reads what all of them made of the stream.
    """

    prefix = "psr_"
    tuner_layer_cls = PSRLayer

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        """As `BaseTuner`; configurations of another type's adapters beneath stay as they are."""
        theirs = other_adapters.configs_beneath(model, peft_config)
        if theirs:
            self.peft_config = {}
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if theirs:
            model.peft_config = theirs  # type: ignore[assignment]

    # PEFT declares `PeftConfig` for every tuner, and gives each one its own kind of configuration
    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: PSRConfig, model_config: dict
    ) -> PSRConfig:
        return peft_config

    def _prepare_model(self, peft_config: PSRConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Find the decoder layers to edit; nothing is touched yet, so errors leave the model as it was."""
        self._layer_names = layers_to_edit(peft_config, model)

    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: PSRConfig, key: str
    ) -> bool | re.Match[str] | None:
        if peft_config.target_modules is not None:
            # a pattern such as "lin0.*" fits the layer of an earlier adapter too
            if isinstance(self.model.get_submodule(key), PSRLayer):
                return False
            return check_target_module_exists(peft_config, key)
        if key not in self._layer_names:
            return False
        # PEFT's own matching for `exclude_modules` and `modules_to_save`, with this layer as the only target
        return check_target_module_exists(ExactTarget(peft_config, key), key)

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: PSRConfig, adapter_name: str, target: nn.Module, *_: Any, current_key: str, **kwargs: Any
    ) -> None:
        layer = getattr(target, "psr", None)
        if not isinstance(layer, PSRLayer):
            if isinstance(target, BaseTunerLayer):
                raise ValueError(
                    f"{current_key!r} is already a tuner layer of another PEFT method ({type(target).__name__}). "
                    "Edit the decoder layer around it instead."
                )
            device = next((parameter.device for parameter in target.parameters()), None)
            width = output_width(target, current_key, self.model)
            layer = PSRLayer(current_key, width, device, attach_state(self.model))
            target.add_module("psr", layer)
            layer.hook = target.register_forward_hook(edit_output, prepend=True)
        active = adapter_name in self.active_adapters
        layer.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode or not active)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter; PEFT takes the edited layers from the keys of `state_dict` where one is given."""
        if state_dict is not None:
            # PEFT cuts a key before ".psr_" to find the layer's name; our child module stands between the two
            state_dict = {key.replace(".psr.psr_", ".psr_"): value for key, value in state_dict.items()}
        present = [config for name, config in self._configs().items() if name != adapter_name]
        other_adapters.check_no_shared_modules(
            model, adapter_name, cast(PSRConfig, self.peft_config[adapter_name]), present
        )
        first = not self.psr_layers()
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict, **kwargs)
        if first:  # PEFT freezes the model beneath a first adapter, but for other adapters on it
            other_adapters.freeze_others(model, self._own_modules())

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, state_dict: dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        # PEFT looks for tuner layers among the modules; under FSDP's activation checkpointing these have other names
        # than the keys, and another tuner's adapter of the same name may sit among them
        return {saved_key(key): value for key, value in state_dict.items() if KEY_OF_UNIT in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, **given: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        # where PEFT loads weights, whichever way they come; it drops without a word what finds no place
        given["state_dict"] = place_weights(given["model"], given["state_dict"])
        state_dict = super()._remap_adapter_state_dict_for_load(**given)
        check_fit(given["model"], given["adapter_name"], state_dict)
        return state_dict

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT comes here last when it loads an adapter, after it has placed the model; of adapters on disk it keeps
        # only those of layers that wrap a module
        for layer in self.psr_layers().values():
            unit = layer.psr_unit[adapter_name] if adapter_name in layer.psr_unit else None
            weights = getattr(getattr(unit, "_hf_hook", None), "weights_map", None)
            if weights is not None and "direction" not in weights:
                raise ValueError(
                    f"{layer.name!r} lies on disk, where PEFT can't load adapter {adapter_name!r} to. Load the base "
                    "model without disk offload, then the adapter, then call accelerate's `dispatch_model`."
                )
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several; raises `ValueError` if there is no such adapter."""
        wanted = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if unknown := [name for name in wanted if name not in self.peft_config]:
            raise ValueError(f"No adapter {unknown[0]!r}; there are: {', '.join(self._names())}.")
        with self._others_left_alone():
            super().set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make PSR adapters trainable or not; adapters of other types stay as they are, whatever their names."""
        with self._others_left_alone():
            super().set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # enabling makes every active adapter trainable, those of other types too
        with self._others_left_alone():
            super()._enable_adapter_layers(enabled)

    def unedited(self) -> AbstractContextManager[None]:
        """Inside, the model runs as without PSR: no edit and none of its `modules_to_save`.

        Unlike PEFT's `disable_adapter` it leaves on what else is on the model, a LoRA for one, and all weights as
        trainable as they are.
        """
        return other_adapters.switched_off(self._own_modules())

    def _saved_modules(self) -> dict[str, AuxiliaryTrainingWrapper]:
        return other_adapters.saved_modules(self.model, list(self._configs().values()))

    def _own_modules(self) -> list[nn.Module]:
        return [*self.psr_layers().values(), *self._saved_modules().values()]

    def _others_left_alone(self) -> AbstractContextManager[None]:
        return other_adapters.others_left_alone(self.model, self._own_modules())

    def unmerge_adapter(self) -> None:
        """Refused like merging, with `ValueError`."""
        self._check_merge_allowed()

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A PSR adapter can't be merged into the base weights: its edit depends on each token's activations. "
            "Keep it as an adapter, or remove it with `unload()`."
        )

    # PEFT declares that this returns nothing; it returns the model, which `unload()` hands on
    def _unload_and_optionally_merge(  # type: ignore[override]
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            layer = getattr(module, "psr", None)
            if isinstance(layer, PSRLayer):
                layer.hook.remove()
                del module.psr
        detach_state(self.model)
        # not PEFT's own way, which would take away the layers of another tuner on the model too
        for name, module in self._saved_modules().items():
            parent = self.model.get_submodule(name.rpartition(".")[0])
            trained = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            setattr(parent, name.rpartition(".")[2], trained)
        if vars(self.model).get("peft_config") is self.peft_config:  # not those of another type beneath
            del self.model.peft_config
        return self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around `forward` and `generate`; it is where `adapter_names` arrives."""
        names = kwargs.get("adapter_names")
        with nullcontext() if torch.compiler.is_compiling() else attach_state(self.model).lock:
            if names is None:
                yield
                return
            check_names(names, self._names(), prompt_of(args, kwargs))
            layers, saved = self.psr_layers().values(), self._saved_modules().values()
            check_weights_at_hand(layers, "adapter_names")
            with rows_named(attach_state(self.model), layers, saved, names):
                yield

    @torch.inference_mode(False)  # the new weights are to be trainable
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[int | str, float] | None:
        """Combine adapters into a new one, `adapter_name`: an ordinary adapter to save and load.

        At strength 1 it does what the adapters do when active together, each at its own strength times its weight, on
        all layers that any of them edits. "cat" is exact: its rank is the largest sum of ranks on a layer. "svd" then
        cuts the rank of each layer to `svd_rank`, by a fit to the edits on `samples` (see `combination.rank_cut`).

        Args:
            adapters: Names of PSR adapters.
            weights: One finite number each; a negative one steers away from the trait.
            adapter_name: Name of the combination; not active until `set_adapter` makes it so.
            combination_type: "cat" or "svd".
            svd_rank: For "svd", the rank to keep, 1 or more.
            samples: For "svd", arguments of forward calls such as `{"input_ids": ..., "labels": ...}`; what they edit
                is what is fitted, so give text that the combination is to steer, with `labels` or a `steering_mask`.

        Returns:
            `None` for "cat". For "svd" the error by layer: RMS of the missing part of the layer's edit relative to
            the RMS of the edit, on edited tokens of `samples` not used for the fit; 0 is exact.

        Raises:
            ValueError: names and weights do not match, a name is unknown or taken, another combination type,
                adapters that can't be one (different positions, `modules_to_save`), or "svd" without rank or samples.
        """
        check_combination(combination_type, svd_rank, samples)
        weights = check_weights(adapters, weights)
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already; delete it or choose another name.")
        check_weights_at_hand(self.psr_layers().values(), "add_weighted_adapter")
        layers = [layer for layer in self.psr_layers().values() if any(name in layer.psr_unit for name in adapters)]
        config, states = combine(
            [self._config(name) for name in adapters],
            weights,
            {layer.name: [layer.unit(a) if a in layer.psr_unit else None for a in adapters] for layer in layers},
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
            for layer in layers:
                layer.unit(adapter_name).load_state_dict(states[layer.name])
            if svd_rank is None or samples is None:
                return None
            return cut_adapter(self, adapter_name, svd_rank, samples)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def _config(self, adapter_name: str) -> PSRConfig:
        return cast(PSRConfig, self.peft_config[self._adapter(adapter_name)])

    def psr_layers(self) -> dict[int | str, PSRLayer]:
        """The model's PSR layers by number of the decoder layer, or by name where numbers won't do, in model order."""
        return layers_of(self.model)

    def _adapter(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"Name one adapter: {', '.join(self.active_adapters) or 'none'} are active.")
            adapter_name = self.active_adapters[0]
        if adapter_name not in self._names():
            raise ValueError(f"No adapter {adapter_name!r}; there are: {', '.join(self._names())}.")
        return adapter_name

    def _configs(self) -> dict[str, PSRConfig]:
        return {name: config for name, config in self.peft_config.items() if isinstance(config, PSRConfig)}

    def _names(self) -> list[str]:
        return sorted(self._configs())

    def set_alpha(self, alpha: float, adapter_name: str | None = None) -> None:
        """Set the strength of an adapter (the active one by default); it is saved with the adapter.

        Args:
            alpha: A finite number; 1.0 is the strength in training, 0.0 no edit, negative values steer away.
            adapter_name: The adapter's name.

        Raises:
            TypeError: alpha is not a number.
            ValueError: alpha is not finite, there is no such adapter, or several are active and none is named.
        """
        name = self._adapter(adapter_name)
        # a copy: other adapters and models may have been made from the same configuration
        config = copy(self._config(name))
        config.alpha = check_strength(alpha, "alpha")
        self.peft_config[name] = config
        for layer in self.psr_layers().values():
            if name in layer.config:
                layer.configure(name, config)

    @contextmanager
    def alpha_scale(self, scale: float) -> Iterator[None]:
        """Multiply every strength by `scale` inside the context: 0.0 is the base model."""
        with attach_state(self.model).scaled(scale):
            yield

    @contextmanager
    def record_gates(self) -> Iterator[dict[tuple[str, str], torch.Tensor]]:
        """Collect gate values in every forward call inside the context, with their graph.

        Yields:
            A dict that each call fills anew: (layer name, adapter name) -> (batch, seq, r) float32. Of a call with
            `adapter_names` the name is "*" and each row's gates are its own adapter's, up to the largest rank.
        """
        state = attach_state(self.model)
        before, state.gates = state.gates, {}
        try:
            yield state.gates
        finally:
            state.gates = before

    @torch.no_grad()
    def gate_values(
        self, input_ids: torch.Tensor, adapter_name: str | None = None, **kwargs: Any
    ) -> dict[int | str, torch.Tensor]:
        """How open an active adapter's gates are at each token, edited or not.

        Args:
            input_ids: (batch, seq).
            adapter_name: The adapter; may be left out while just one is active.
            **kwargs: For the model's forward: `attention_mask`, `steering_mask`, `alpha`, ...

        Returns:
            {layer: lambda (batch, seq, r) >= 0, float32}, in model order.

        Raises:
            ValueError: the adapter is not active, or `adapter_names` is given: the gates are those of active adapters.
        """
        if "adapter_names" in kwargs:
            raise ValueError("gate_values looks at an active adapter, not at adapter_names; `set_adapter` it first.")
        name = self._adapter(adapter_name)
        if name not in self.active_adapters or any(layer.disable_adapters for layer in self.psr_layers().values()):
            raise ValueError(f"Adapter {name!r} is not active, so its gates don't act; `set_adapter({name!r})` first.")
        with self.record_gates() as gates:
            self.model(input_ids=input_ids, **kwargs)
        return {
            key: gates[layer.name, name] for key, layer in self.psr_layers().items() if (layer.name, name) in gates
        }
