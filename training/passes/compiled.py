"""`torch.compile` for training: the decoder layers' own computation, layer by layer; the hooks on them run eagerly.

A model that is compiled as a whole takes the hooks of a training step (edits, captured outputs, gates) and its
switches between teacher and student into its graph, and compiles anew as they change. The layers are frozen and all
alike, so that a few graphs serve all of them, prompted and steered.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from transformers import TrainingArguments

from peft_psr.base_model.decoder import decoder_layer_names

from .partial import attribute


GRAPHS = 64
"""Graphs that may be made of decoder layers in one process, of one model after another."""


@contextmanager
def compiled_layers(model: PeftModel, args: TrainingArguments) -> Iterator[None]:
    """Inside, the decoder layers' `forward` is compiled, for any length of sequences, if `torch_compile` says so.

    Raises:
        ValueError: a layer is offloaded, so that its `forward` fetches its weights.
    """
    if not args.torch_compile:
        yield
        return
    base = model.get_base_model()
    layers = {
        name: base.get_submodule(name) for name in decoder_layer_names(base, model.active_peft_config.layers_pattern)
    }
    offloaded = [name for name, layer in layers.items() if "forward" in vars(layer)]
    if offloaded:
        raise ValueError(
            f"torch_compile=True can't compile {offloaded[0]!r}: something has put a `forward` of its own on it, as "
            "accelerate does to layers that are offloaded. Train without torch_compile, or load the model whole."
        )
    backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    with ExitStack() as stack:
        # for mixes of gradients, padding and single rows; all layers of a process share the count
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=GRAPHS))
        for layer in layers.values():
            compiled = torch.compile(layer.forward, dynamic=True, backend=backend, mode=mode)
            stack.enter_context(attribute(layer, "forward", compiled))
        yield
