"""Where calls enter a model with PSR layers, so that every way in is steered alike.

`PeftModel`, a pipeline, `PreTrainedModel.load_adapter`, or the bare model: each ends in the base model's `forward` or
`generate`. A pre-hook on the model, and one on its decoder for calls that pass by the model, take `steering_mask` and
`alpha` off the arguments; `SteeredGenerate` stands before the model's own `generate`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .caches import first_given
from .state import Generation, SteeringState, check_mask


class SteeredGenerate:
    """The model's `generate`, which takes `steering_mask` and `alpha` too and knows which tokens are the prompt.

    Args:
        model: A model with a steering state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.original = model.__dict__.get("generate")

    def __call__(self, *args: Any, steering_mask: torch.Tensor | None = None, alpha: Any = None, **kwargs: Any):
        """Generate, steered from the prompt on.

        Args:
            *args: For the model's own `generate`.
            steering_mask: (batch, prompt) of 0/1: prompt tokens to edit. Without it `PSRConfig.positions` decides
                (`peft_psr.positions.encode_chat` builds masks from conversations). Generated tokens are all edited.
            alpha: Strength in place of the adapters' own: a number, or one per row.
            **kwargs: For the model's own `generate`.

        Raises:
            ValueError: `steering_mask` or `alpha` does not fit the prompt, or `guidance_scale` is given.
        """
        state: SteeringState = self.model._psr_state  # type: ignore[assignment]
        if self._setting("guidance_scale", kwargs) not in (None, 1, 1.0):
            raise ValueError(
                "guidance_scale runs a second prompt through the model, whose tokens can't be told from the first's. "
                "Leave it out; a negative alpha steers away from a trait."
            )
        prompt = prompt_of(args, kwargs)
        encoder_decoder = is_encoder_decoder(self.model)
        generation = None
        if steering_mask is not None and (encoder_decoder or not isinstance(prompt, torch.Tensor)):
            raise ValueError(
                "generate takes a steering_mask together with a prompt of a decoder-only model, as `input_ids`; an "
                "encoder-decoder's generated tokens are all edited."
            )
        if isinstance(prompt, torch.Tensor):
            batch, length = prompt.shape[:2]
            mask = None if steering_mask is None else check_mask(steering_mask, batch, length)
            attention_mask = kwargs.get("attention_mask")
            if attention_mask is None:
                attention_mask = torch.ones(batch, length, dtype=torch.long, device=prompt.device)
            if mask is not None:  # what a given cache holds already comes before the prompt
                mask = nn.functional.pad(mask, (attention_mask.shape[1] - length, 0))
            generation = Generation(attention_mask, mask, decoding=encoder_decoder)
        elif prompt is None and not encoder_decoder:  # the model begins with its BOS token
            generation = Generation(torch.ones(1, 1, dtype=torch.long), None)
        with state.lock:
            before = state.generation, state.generation_alpha
            state.generation, state.generation_alpha = generation, alpha
            try:
                if self.original is not None:
                    return self.original(*args, **kwargs)
                return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[attr-defined]
            finally:
                state.generation, state.generation_alpha = before

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """What transformers takes for a setting of `generate`."""
        configs = (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in given if value is not None), None)


class SteeredBatching:
    """The model's `init_continuous_batching`, where it can be steered: also what `generate_batch` begins with.

    Args:
        model: A model with a steering state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Begin continuous batching.

        Raises:
            NotImplementedError: an adapter edits the response alone, whose beginnings can't be told in one long row.
        """
        if "response" in self.model._psr_state.positions:  # type: ignore[union-attr, operator]
            raise NotImplementedError(
                "Continuous batching (`generate_batch`, `init_continuous_batching`) lays all prompts in one row, "
                "where positions='response' can't find their ends. Use `generate`, or an adapter with positions='all'."
            )
        return type(self.model).init_continuous_batching(self.model, *args, **kwargs)  # type: ignore[attr-defined]


def prompt_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The prompt among the arguments of `forward` or `generate`, ids or embeddings, or `None`."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return first_given((*args[:1], *named))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads its prompt with an encoder, such as T5's."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def begin_steered_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook (with keyword arguments) of a model with PSR layers."""
    state: SteeringState = model._psr_state  # type: ignore[assignment]
    state.begin_call(_by_name(model, args, kwargs), is_encoder_decoder(model))
    state.begun = True
    return args, _without_ours(kwargs)


def end_steered_call(model: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the model; it runs after a failed call too, which may not have reached the decoder."""
    model._psr_state.begun = False  # type: ignore[union-attr]


def begin_decoder_call(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of its decoder, for a call that did not come through the model."""
    state: SteeringState = decoder._psr_state  # type: ignore[assignment]
    if not state.begun:
        state.begin_call(_by_name(decoder, args, kwargs), is_encoder_decoder(decoder))
    state.begun = False
    return args, _without_ours(kwargs)


def _by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names: list[str] = model._psr_arguments  # type: ignore[assignment]
    return {**dict(zip(names[: len(args)], args[: len(names)], strict=True)), **kwargs}


def _without_ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("steering_mask", "alpha")}


def attach_state(model: nn.Module) -> SteeringState:
    """The state shared by the model's PSR layers; made, with its hooks, when the first adapter is added."""
    state: SteeringState | None = getattr(model, "_psr_state", None)
    if state is not None:
        return state
    state = SteeringState()
    get_decoder = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    hooks: dict[nn.Module, Any] = {model: begin_steered_call}
    if isinstance(decoder, nn.Module) and decoder is not model:
        hooks[decoder] = begin_decoder_call
    for module, hook in hooks.items():
        module._psr_state = state  # type: ignore[assignment]
        module._psr_arguments = list(inspect.signature(type(module).forward).parameters)[1:]  # type: ignore[assignment]
        module._psr_handles = [module.register_forward_pre_hook(hook, with_kwargs=True)]  # type: ignore[assignment]
    model._psr_handles.append(model.register_forward_hook(end_steered_call, always_call=True))  # type: ignore
    if hasattr(model, "generate"):
        model.generate = SteeredGenerate(model)  # type: ignore[assignment]
    if hasattr(model, "init_continuous_batching"):
        model.init_continuous_batching = SteeredBatching(model)  # type: ignore[assignment]
    return state


def detach_state(model: nn.Module) -> None:
    """Undo `attach_state`."""
    for module in model.modules():
        if module.__dict__.pop("_psr_state", None) is not None:
            module.__dict__.pop("_psr_arguments")
            for handle in module.__dict__.pop("_psr_handles"):
                handle.remove()
    model.__dict__.pop("init_continuous_batching", None)
    generate = model.__dict__.pop("generate", None)
    if isinstance(generate, SteeredGenerate) and generate.original is not None:
        model.generate = generate.original  # type: ignore[assignment]
