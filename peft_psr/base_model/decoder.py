"""Where the residual stream lives: decoder layers found by structure, their width, and their outputs."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's language part, or `None` for a model without a transformers configuration."""
    get_text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    return None if get_text_config is None else get_text_config(decoder=True)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads its prompt with an encoder, such as T5's."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoder_layer_names(model: nn.Module, layers_pattern: str | list[str] | None = None) -> list[str]:
    """Names of the decoder layers of `model`, in order, as `model.get_submodule` takes them.

    The layers are the first `ModuleList` inside the model's text decoder that is as long as the configuration says
    (`num_hidden_layers`, or T5's `num_decoder_layers`); `layers_pattern` names the list instead (its last name, such
    as "layers" or "h").

    Raises:
        ValueError: no such list; the message says to name it with `layers_pattern` or to give `target_modules`.
    """
    config = text_config(model)
    depth = getattr(config, "num_decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    get_decoder = getattr(model, "get_decoder", None) if layers_pattern is None else None
    decoder: nn.Module = model if get_decoder is None else get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for name, module in decoder.named_modules(prefix=prefix):
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        named = patterns is not None and (name.split(".")[-1] in patterns or name in patterns)
        if named or (patterns is None and depth in (None, len(module))):
            return [f"{name}.{i}" for i in range(len(module))]
    wanted = f"named {layers_pattern!r}" if layers_pattern else f"of {depth} decoder layers"
    raise ValueError(
        f"{type(model).__name__} has no ModuleList {wanted}. Name the list that holds the decoder layers with "
        "`layers_pattern`, or the modules to edit with `target_modules`."
    )


def layer_index(name: str) -> int | str:
    """The layer's number where `name` ends in one ("model.layers.3" -> 3), else the name itself."""
    match = re.search(r"(?:^|\.)(\d+)$", name)
    return int(match.group(1)) if match else name


def output_width(module: nn.Module, name: str, model: nn.Module) -> int:
    """Last dimension of what `module` returns: the hidden size for a decoder layer.

    Raises:
        ValueError: it can't be told from the module or the model's configuration.
    """
    for attribute in ("out_features", "nf", "embedding_dim"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple):
        return shape[-1]
    width = getattr(text_config(model), "hidden_size", None)
    if isinstance(width, int):
        return width
    raise ValueError(
        f"Can't tell the width of the output of {name!r} ({type(module).__name__}): it has no `out_features` and the "
        "model no `config.hidden_size`. Target a module that has one."
    )


def hidden_of(output: object, name: str) -> torch.Tensor:
    """The hidden states (batch, seq, d) in a layer's output, itself or first in a tuple; `TypeError` for any other."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(
            f"Layer {name!r} returned {type(output).__name__}; PSR edits a tensor or the first tensor of a tuple."
        )
    return hidden


@contextmanager
def capture_layer_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Record what the named layers return, edits included, in every forward call inside the context.

    `output_hidden_states=True` would not do: transformers applies the final norm to its last entry.

    Yields:
        A dict that each forward call fills anew: name -> hidden states (batch, seq, d), with their graph.
    """
    outputs: dict[str, torch.Tensor] = {}

    def record(module: nn.Module, args: tuple, output: object, name: str) -> None:
        outputs[name] = hidden_of(output, name)

    handles = [model.get_submodule(name).register_forward_hook(partial(record, name=name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
