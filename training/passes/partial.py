"""Runs part of a frozen model: from a decoder layer whose output is known, up to a layer, or the head alone.

The layers left out stay where they are; for the time of a call their `forward` hands a known tensor on. So the model's
own code does all else (masks, rotary embeddings, final norm, soft-capping), whatever the layout.

Not for a model that computes layers again in the backward pass (gradient checkpointing), since that happens after the
call, nor for one that is compiled as a whole; one whose layers are compiled (see `compiled`) will do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_psr.base_model.decoder import decoder_layer_names
from peft_psr.hooks import attach_state
from peft_psr.layer import PSRLayer


_TUPLE_LENGTHS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def known_output(
    model: nn.Module, names: Sequence[str], hidden: torch.Tensor, edited: bool
) -> AbstractContextManager[None]:
    """Inside, the first decoder layers are not computed in a forward call: the last of them returns `hidden`.

    Args:
        model: The base model of a PEFT model with a PSR adapter.
        names: Names of these layers, from the first one on; none leaves the model as it is.
        hidden: (batch, seq, d), in the model's dtype.
        edited: `hidden` carries the last layer's edit already; if not, the layer's adapters edit it.
    """
    return _replaced(model, names, lambda given: hidden, names if edited else names[:-1])


def stop_after(model: nn.Module, names: Sequence[str]) -> AbstractContextManager[None]:
    """Inside, the last decoder layers, by `names`, pass their input through: neither computed nor edited."""
    return _replaced(model, names, lambda given: given, names)


def predict(model: nn.Module, hidden: torch.Tensor, layers_pattern: str | list[str] | None = None) -> torch.Tensor:
    """Logits (n, vocabulary) of outputs (n, d) of the last decoder layer, edits included, by the model's own head.

    Its final norm goes before, and the graph of `hidden` on. The model, with a PSR adapter or its base, is no
    encoder-decoder.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = decoder_layer_names(base, layers_pattern)
    # every row is a sequence of one token; which token it is does not matter, no layer looks at it
    tokens = torch.zeros(len(hidden), 1, dtype=torch.long, device=_device(model))
    with _undisturbed(base), known_output(base, names, hidden[:, None], edited=True):
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[:, 0]


@contextmanager
def _replaced(
    model: nn.Module, names: Sequence[str], output: Callable[[torch.Tensor], torch.Tensor], off: Sequence[str]
) -> Iterator[None]:
    if names:
        _learn_outputs(model, names)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_forward_of(model.get_submodule(name), output))
        for name in off:
            layer = getattr(model.get_submodule(name), "psr", None)
            if isinstance(layer, PSRLayer):
                stack.enter_context(attribute(layer, "_disable_adapters", True))
        yield


def _forward_of(module: nn.Module, output: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[None]:
    length = _TUPLE_LENGTHS[module]

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = output(args[0] if args else kwargs["hidden_states"])
        return (result, *[None] * (length - 1)) if length else result

    return attribute(module, "forward", forward)


@contextmanager
def attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `target` has the attribute `name` of this value; then what it had before, or none of its own."""
    had, before = name in target.__dict__, target.__dict__.get(name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if had:
            setattr(target, name, before)
        else:
            delattr(target, name)


def _device(model: nn.Module) -> torch.device:
    """Where inputs may lie: with the first weights that are not offloaded."""
    return next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))


@torch.no_grad()
def _learn_outputs(model: nn.Module, names: Sequence[str]) -> None:
    """Learn which layers return a tensor and which a tuple, by one token; once for each model."""
    modules = [model.get_submodule(name) for name in names]
    if all(module in _TUPLE_LENGTHS for module in modules):
        return

    def learn(module: nn.Module, args: tuple, output: Any) -> None:
        _TUPLE_LENGTHS[module] = len(output) if isinstance(output, tuple) else 0

    handles = [module.register_forward_hook(learn) for module in modules]
    try:
        with _undisturbed(model):
            tokens = torch.zeros(1, 1, dtype=torch.long, device=_device(model))
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave no trace of the calls inside in the steering state; in eval mode, so that nothing is checkpointed."""
    state = attach_state(model)
    before, was_training = dict(vars(state)), model.training
    if was_training:
        model.eval()
    state.adapter_names, state.gates = None, None
    try:
        yield
    finally:
        vars(state).update(before)
        if was_training:
            model.train()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; then in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def input_device(model: PreTrainedModel | PeftModel) -> torch.device:
    """Where a call's tensors are to be.

    Weights that accelerate offloads are on no device between calls; its hooks move what is given to them.
    """
    return torch.device("cpu") if model.device.type == "meta" else model.device
