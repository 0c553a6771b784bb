"""Where calls enter a model with PSR layers, so that every way in is steered alike.

`PeftModel`, a pipeline, `PreTrainedModel.load_adapter`, or the bare model: each ends in the base model's `forward` or
`generate`. A pre-hook on the model, and one on its decoder for calls that pass by the model, take `steering_mask` and
`alpha` off the arguments; `SteeredGenerate` stands before the model's own `generate`.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_psr.base_model import caches
from peft_psr.base_model.caches import cache_of, first_given
from peft_psr.base_model.decoder import is_encoder_decoder
from peft_psr.base_model.fit import CheckedLoad

from .call_state import Generation, SteeringState, check_mask, check_row_count
from .layer import PSRLayer
from .rows import BASE, gather_rows


class SteeredGenerate:
    """A steered model's `generate`, which takes `steering_mask` and `alpha` too and knows what is the prompt."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.original = model.__dict__.get("generate")

    def __call__(self, *args: Any, steering_mask: torch.Tensor | None = None, alpha: Any = None, **kwargs: Any) -> Any:
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
            self._complete_prefix(cache_of(kwargs), length, attention_mask)
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

    def _complete_prefix(self, cache: Any, length: int, attention_mask: torch.Tensor) -> None:
        """Have the last token of a cached prefix computed again, which was edited as if the prompt ended there."""
        if not caches.ends_in_prompt(cache) or caches.tokens_in(cache) >= attention_mask.shape[1]:
            return
        # where the ids go on from the cache, they do not hold that token
        if length < attention_mask.shape[1] or not caches.drop_last_token(cache):
            self.model._psr_state.warn_once(  # type: ignore[union-attr, operator]
                "The last token of the given cache was edited as the end of a prompt, and can't be computed again. "
                "Fill the cache of a prefix with `alpha=0.0`, or with a `steering_mask` of zeros."
            )

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """What transformers takes for a setting of `generate`."""
        configs = (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in given if value is not None), None)


class SteeredBatching:
    """A model's `init_continuous_batching`, where it can be steered: also what `generate_batch` begins with."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Begin it; `NotImplementedError` for an adapter that edits the response alone."""
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


def begin_steered_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook (with keyword arguments) of a model with PSR layers."""
    state: SteeringState = model._psr_state  # type: ignore[assignment]
    state.begin_call(_by_name(model, args, kwargs), is_encoder_decoder(model))
    state.begun = True
    return args, _without_ours(kwargs)


def end_steered_call(model: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the model; it runs after a failed call too, which may not have reached the decoder.

    Of its decoder as well, for a call that did not come through the model.
    """
    state: SteeringState = model._psr_state  # type: ignore[assignment]
    state.begun = False
    if state.prompt_ends and isinstance(output, Mapping):
        cache = cache_of(output)
        if cache is not None and any(_acting(model)):
            caches.mark_prompt_end(cache)
        _look_for_lost_labels(model, state, next(iter(output.values())))
    state.prompt_ends = False


def _look_for_lost_labels(model: nn.Module, state: SteeringState, output: Any) -> None:
    """Warn in the backward pass if a language model that takes its text for a prompt is trained on more than its end.

    `output`, what the model or its decoder returned first, is (batch, seq, ...).
    """
    mask = state.masks.get("response")
    if mask is None or not state.predicts_tokens or not isinstance(output, torch.Tensor) or not output.requires_grad:
        return
    if output.dim() != 3 or output.shape[:2] != mask.shape:
        return

    def look(gradient: torch.Tensor) -> None:
        elsewhere = gradient.abs().amax(dim=-1).masked_fill(mask.to(gradient.device), 0.0)
        if elsewhere.any() and _trains_response(model):
            state.warn_once(
                "A loss on all tokens of a text was given neither `labels` nor a `steering_mask` in the forward call, "
                "which then takes the text for a prompt: an adapter with positions='response' edits its last token "
                "alone, and learns nothing from the others. transformers' Trainer takes the labels off the batch for "
                "`label_smoothing_factor` and `compute_loss_func`. Train with PSRTrainer, or have the data collator "
                "add `steering_mask=peft_psr.positions.response_mask(labels)` to the batch."
            )

    output.register_hook(look)


def _acting(model: nn.Module) -> Iterator[tuple[PSRLayer, str]]:
    """The layers that edit and the names of the adapters that are active there."""
    for layer in model.modules():
        if isinstance(layer, PSRLayer) and not layer.disable_adapters:
            yield from ((layer, name) for name in layer.active_adapters if name in layer.psr_unit)


def _trains_response(model: nn.Module) -> bool:
    """Whether an active adapter with positions "response" asks for a gradient."""
    return any(
        layer.config[name].positions == "response" and any(w.requires_grad for w in layer.unit(name).parameters())
        for layer, name in _acting(model)
    )


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
    get_head = getattr(model, "get_output_embeddings", None)
    state = SteeringState(predicts_tokens=get_head is not None and get_head() is not None)
    get_decoder = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    hooks: dict[nn.Module, Any] = {model: begin_steered_call}
    if isinstance(decoder, nn.Module) and decoder is not model:
        hooks[decoder] = begin_decoder_call
    for module, hook in hooks.items():
        module._psr_state = state  # type: ignore[assignment]
        module._psr_arguments = list(inspect.signature(type(module).forward).parameters)[1:]  # type: ignore[assignment]
        module._psr_handles = [  # type: ignore[assignment]
            module.register_forward_pre_hook(hook, with_kwargs=True),
            module.register_forward_hook(end_steered_call, always_call=module is model),
        ]
    if hasattr(model, "generate"):
        model.generate = SteeredGenerate(model)  # type: ignore[assignment]
    if hasattr(model, "init_continuous_batching"):
        model.init_continuous_batching = SteeredBatching(model)  # type: ignore[assignment]
    if hasattr(model, "_load_pretrained_model"):
        model._load_pretrained_model = CheckedLoad(model)  # type: ignore[assignment]
    return state


def detach_state(model: nn.Module) -> None:
    """Undo `attach_state`."""
    for module in model.modules():
        if module.__dict__.pop("_psr_state", None) is not None:
            module.__dict__.pop("_psr_arguments")
            for handle in module.__dict__.pop("_psr_handles"):
                handle.remove()
    for name in ("init_continuous_batching", "_load_pretrained_model"):
        model.__dict__.pop(name, None)
    generate = model.__dict__.pop("generate", None)
    if isinstance(generate, SteeredGenerate) and generate.original is not None:
        model.generate = generate.original  # type: ignore[assignment]


def check_names(names: Sequence[Any], known: Sequence[str], prompt: Any) -> None:
    """Raise `ValueError` if `adapter_names` of a call are not one adapter's name for each row of its prompt."""
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names must be one adapter's name for each row, got {names!r}.")
    if isinstance(prompt, torch.Tensor):
        check_row_count(names, prompt.shape[0])
    missing = sorted(set(names) - {BASE, *known})
    if missing:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(missing)}. There are: "
            f"{', '.join(known)}, and {BASE!r} for none."
        )


@contextmanager
def rows_named(
    state: SteeringState, layers: Collection[PSRLayer], saved: Iterable[nn.Module], names: Sequence[str]
) -> Iterator[None]:
    """Inside, `names` has each row's adapter, which edits it, with its own of the modules `saved` with adapters."""
    state.adapter_names = list(names)
    for layer in layers:
        layer.rows = gather_rows({name: layer.unit(name) for name in layer.psr_unit}, layer.config, names)
    handles = [
        module.register_forward_pre_hook(partial(_name_rows, names=list(names)), with_kwargs=True) for module in saved
    ]
    try:
        yield
    finally:
        state.adapter_names = None
        for layer in layers:
            layer.rows = None
        for handle in handles:
            handle.remove()


def _name_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any], names: list[str]) -> tuple[tuple, dict]:
    """Pre-hook that tells a module of `modules_to_save` each row's adapter; beams repeat a row."""
    times = len(args[0]) // len(names)
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(times)]}
