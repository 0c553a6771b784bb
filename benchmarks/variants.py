"""What is timed: a model without an edit, the same edit made in several ways, and LoRA for scale.

Every variant has a module tree of its own over the same parameters, so hooks and wrappers don't meet and all variants
read the same memory. The peers' ways are in `peers.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_psr import PSRConfig
from peft_psr.base_model.caches import cache_name


CACHE = cache_name(LlamaForCausalLM.forward)

Triple = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]
"""w (r, d) and b (r,), or `None` for the constant gate; z (r, d). All float32."""

Edit = dict[int, Triple]
"""{number of a decoder layer: its weights}; empty for no edit."""

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(zip(SIZES, (32, 3, 4, 2, 48, 64), strict=True)),
    "135m": dict(zip(SIZES, (576, 30, 9, 3, 1536, 49152), strict=True)),
    "1b": dict(zip(SIZES, (2048, 16, 32, 8, 8192, 128256), strict=True)),
    "7b": dict(zip(SIZES, (4096, 32, 32, 32, 11008, 32000), strict=True)),
}
"""Shapes of Llama models: SmolLM2-135M, Llama-3.2-1B, Llama-2-7B, and one for tests."""


@dataclass
class Variant:
    """One way of running the model.

    Attributes:
        forward: The model's forward, of keyword arguments; its result has `logits` (batch, seq, vocabulary).
        generate: The model's `generate`, of `input_ids` and further keyword arguments.
        edits: What it has to compute: one edit for all rows, or one for each.
        positions: "all", or "response": from the last prompt token on.
    """

    forward: Callable[..., Any]
    generate: Callable[..., torch.Tensor]
    edits: Sequence[Edit]
    positions: str = "all"


def build_model(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Llama of one of `SHAPES` with random weights, frozen and in eval mode."""
    tied = shape != "7b"
    config = LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules over the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def random_edit(
    model: PreTrainedModel, r: int = 1, gate: str = "relu", layers: Sequence[int] | None = None, seed: int = 0
) -> Edit:
    """An edit whose gates open on about every other token and that shows in the logits.

    The stream of a model with random weights has features of about 0.02, which is what the factors are for.
    """
    config = model.config
    layers = range(config.num_hidden_layers) if layers is None else layers
    size = 0.03 / (r * len(layers)) ** 0.5
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.device)

    def triple() -> Triple:
        w, b, z = normal(r, config.hidden_size), normal(r), normal(r, config.hidden_size)
        gated = gate == "relu"
        return (
            w * 50 / config.hidden_size**0.5 if gated else None,
            b * 0.5 if gated else None,
            z * size,
        )

    return {layer: triple() for layer in layers}


def plain(base: PreTrainedModel, batch: int) -> Variant:
    """The model as it is."""
    model = shared_copy(base)
    return Variant(model.__call__, model.generate, [{}])


def empty_hook(base: PreTrainedModel, batch: int) -> Variant:
    """A hook on every layer that does nothing: what any way that hangs on hooks pays at least."""
    model = shared_copy(base)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: output)
    return Variant(model.__call__, model.generate, [{}])


def naive_hook(base: PreTrainedModel, batch: int) -> Variant:
    """The edit as one would write it in a notebook: rank 1, the model's dtype, no positions, no adapters."""
    model, edit = shared_copy(base), random_edit(base)
    for index, (w, b, z) in edit.items():
        w, b, z = w[0].to(base.dtype), b[0].to(base.dtype), z[0].to(base.dtype)

        def hook(module, args, output, w=w, b=b, z=z):
            return output + torch.relu(output @ w + b).unsqueeze(-1) * z

        model.model.layers[index].register_forward_hook(hook)
    return Variant(model.__call__, model.generate, [edit])


def psr(
    r: int = 1, gate: str = "relu", one_layer: bool = False, positions: str = "all"
) -> Callable[[PreTrainedModel, int], Variant]:
    """This project: the active adapter on all rows."""

    def build(base: PreTrainedModel, batch: int) -> Variant:
        layers = [base.config.num_hidden_layers // 2] if one_layer else None
        edit = random_edit(base, r, gate, layers)
        model = adapted(base, [edit], positions)
        return Variant(model.__call__, model.generate, [edit], positions)

    return build


def psr_by_name(adapters: int | None = None) -> Callable[[PreTrainedModel, int], Variant]:
    """This project: one adapter a row, named in `adapter_names`; as many adapters as rows unless said otherwise."""

    def build(base: PreTrainedModel, batch: int) -> Variant:
        edits = [random_edit(base, seed=seed) for seed in range(adapters or batch)]
        model = adapted(base, edits, "all")
        rows = [row % len(edits) for row in range(batch)]
        names = [f"trait{index}" for index in rows]

        def forward(**inputs: Any) -> Any:
            return model(adapter_names=names, **inputs)

        def generate(**inputs: Any) -> torch.Tensor:
            return model.generate(adapter_names=names, **inputs)

        return Variant(forward, generate, [edits[index] for index in rows])

    return build


def adapted(base: PreTrainedModel, edits: Sequence[Edit], positions: str) -> PeftModel:
    """The model with one adapter for each edit, "trait0", "trait1" and so on, the first one active."""
    model = None
    for number, edit in enumerate(edits):
        w, _, z = next(iter(edit.values()))
        config = PSRConfig(
            r=z.shape[0],
            gate="constant" if w is None else "relu",
            layers_to_transform=list(edit),
            positions=positions,
            inference_mode=True,
        )
        name = f"trait{number}"
        if model is None:
            model = get_peft_model(shared_copy(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        weights = get_peft_model_state_dict(model, adapter_name=name)
        for key in weights:
            index = int(re.search(r"\.layers\.(\d+)\.", key)[1])
            kind = ("gate_weight", "gate_bias", "direction").index(key.rsplit(".", 1)[1])
            weights[key] = edit[index][kind]
        set_peft_model_state_dict(model, weights, adapter_name=name)
    return model.eval()


def lora(base: PreTrainedModel, batch: int) -> Variant:
    """LoRA of rank 8 on the projections that PEFT takes by default, not merged; its start changes nothing."""
    model = get_peft_model(shared_copy(base), LoraConfig(r=8, task_type="CAUSAL_LM", inference_mode=True)).eval()
    return Variant(model.__call__, model.generate, [{}])


VARIANTS: dict[str, Callable[[PreTrainedModel, int], Variant]] = {
    "base": plain,
    "base-again": plain,
    "empty-hook": empty_hook,
    "naive-hook": naive_hook,
    "s-psr": psr(one_layer=True),
    "a-psr": psr(),
    "a-psr-response": psr(positions="response"),
    "a-psr-r8": psr(r=8),
    "a-const": psr(gate="constant"),
    "one-by-name": psr_by_name(1),
    "mixed": psr_by_name(),
    "lora-r8": lora,
}
"""Ways to build a variant from the base model and the number of rows, in the order in which they are shown."""


def token_positions(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Positions 0, 1, ... of every row, (batch, length): written out, since repeng takes no broadcast row."""
    return torch.arange(length, device=device).repeat(batch, 1)


@torch.no_grad()
def call(variant: Variant, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """One call as generation makes it: logits (batch, 1, vocabulary) of the last token."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids, CACHE: cache}
    if input_ids.device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    return variant.forward(**inputs, use_cache=True, logits_to_keep=1).logits


def logits_of(variant: Variant, ids: torch.Tensor, prompt_length: int, cache: Cache) -> torch.Tensor:
    """Logits of `ids` from the last prompt token on: the prompt in one call, then token by token.

    Args:
        variant: What computes them.
        ids: (batch, seq), the prompt and some tokens more.
        prompt_length: Tokens of the prompt.
        cache: An empty cache.

    Returns:
        (batch, seq - prompt_length + 1, vocabulary).
    """
    batch, length = ids.shape
    positions = token_positions(batch, length, ids.device)
    spans = [(0, prompt_length), *((i, i + 1) for i in range(prompt_length, length))]
    logits = []
    for start, end in spans:
        step = ids[:, start:end].contiguous(), positions[:, start:end].contiguous()
        logits.append(call(variant, *step, cache).clone())
    return torch.cat(logits, dim=1)


@torch.no_grad()
def reference_logits(
    base: PreTrainedModel, edits: Sequence[Edit], ids: torch.Tensor, prompt_length: int, positions: str = "all"
) -> torch.Tensor:
    """The same logits by plain hooks in float32, one row at a time, without a cache."""
    mask = torch.ones(ids.shape[1], 1, device=ids.device)
    if positions == "response":
        mask[: prompt_length - 1] = 0
    rows = []
    for row in range(ids.shape[0]):
        model = shared_copy(base)
        for index, (w, b, z) in edits[row % len(edits)].items():

            def hook(module, args, output, w=w, b=b, z=z):
                hidden = output.float()
                gates = hidden.new_ones(*hidden.shape[:-1], z.shape[0]) if w is None else (hidden @ w.T + b).relu()
                return (hidden + mask * (gates @ z)).to(output.dtype)

            model.model.layers[index].register_forward_hook(hook)
        kept = ids.shape[1] - prompt_length + 1
        rows.append(model(input_ids=ids[row : row + 1], use_cache=False, logits_to_keep=kept).logits)
    return torch.cat(rows)


def edit_error(base: PreTrainedModel, variant: Variant, ids: torch.Tensor, prompt_length: int, cache: Cache) -> float:
    """Distance of the variant's logits from the reference's, as a share of what the edit changes in them."""
    unedited = reference_logits(base, [{}], ids, prompt_length).float()
    expected = reference_logits(base, variant.edits, ids, prompt_length, variant.positions).float()
    change = (expected - unedited if any(variant.edits) else unedited).norm()
    return float((logits_of(variant, ids, prompt_length, cache).float() - expected).norm() / change)
