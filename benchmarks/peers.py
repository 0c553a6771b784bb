"""The same edits by steering-vectors, repeng and pyreft, each by its own public interface.

Each library is imported when its variant is built, so a missing one only takes its own variants away. None of them
knows positions of a response, so they edit every token. Versions and install line: `benchmarks/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from variants import Variant, random_edit, shared_copy


PACKAGES = ("steering-vectors", "repeng", "pyreft", "pyvene")


def steering_vectors_constant(base: PreTrainedModel, batch: int) -> Variant:
    """A vector on every layer, which is what the library is made for."""
    from steering_vectors import SteeringVector

    model, edit = shared_copy(base), random_edit(base, gate="constant")
    vector = SteeringVector({layer: z[0].to(base.dtype) for layer, (_, _, z) in edit.items()})
    vector.patch_activations(model)
    return Variant(model.__call__, model.generate, [edit])


def steering_vectors_gated(base: PreTrainedModel, batch: int) -> Variant:
    """The gate as an `operator`, which the library takes one of a call, so each layer has a vector of its own."""
    from steering_vectors import SteeringVector

    model, edit = shared_copy(base), random_edit(base)
    for layer, (w, b, z) in edit.items():
        w, b = w[0].to(base.dtype), b[0].to(base.dtype)

        def gated(hidden: torch.Tensor, z: torch.Tensor, w=w, b=b) -> torch.Tensor:
            return torch.relu(hidden @ w + b).unsqueeze(-1) * z

        SteeringVector({layer: z[0].to(base.dtype)}).patch_activations(model, operator=gated)
    return Variant(model.__call__, model.generate, [edit])


def repeng_constant(base: PreTrainedModel, batch: int) -> Variant:
    """A control vector on every layer, which is what the library is made for."""
    from repeng import ControlModel

    edit = random_edit(base, gate="constant")
    model = ControlModel(shared_copy(base), range(base.config.num_hidden_layers))
    model.set_raw_control({layer: z[0].to(base.dtype) for layer, (_, _, z) in edit.items()})
    return Variant(model.__call__, model.generate, [edit])


def repeng_gated(base: PreTrainedModel, batch: int) -> Variant:
    """The gate as an `operator`, set layer by layer."""
    from repeng import ControlModel
    from repeng.control import BlockControlParams, model_layer_list

    edit = random_edit(base)
    model = ControlModel(shared_copy(base), range(base.config.num_hidden_layers))
    layers = model_layer_list(model)
    for layer, (w, b, z) in edit.items():
        w, b = w[0].to(base.dtype), b[0].to(base.dtype)

        def gated(hidden: torch.Tensor, z: torch.Tensor, w=w, b=b) -> torch.Tensor:
            return hidden + torch.relu(hidden @ w + b).unsqueeze(-1) * z

        layers[layer].set_control(BlockControlParams(z[0].to(base.dtype), operator=gated))
    return Variant(model.__call__, model.generate, [edit])


def pyreft_gated(base: PreTrainedModel, batch: int) -> Variant:
    """`NodireftIntervention` with `act_fn="relu"` is this very edit; no locations means every token."""
    from pyreft import NodireftIntervention, ReftConfig, get_reft_model

    edit = random_edit(base)
    representations = []
    for layer, (w, b, z) in edit.items():
        intervention = NodireftIntervention(
            embed_dim=base.config.hidden_size, low_rank_dimension=1, add_bias=False, act_fn="relu", dtype=base.dtype
        )
        with torch.no_grad():
            intervention.learned_source.weight.copy_(w)
            intervention.learned_source.bias.copy_(b)
            intervention.proj_layer.weight.copy_(z)
        representations.append(
            {"layer": layer, "component": "block_output", "low_rank_dimension": 1, "intervention": intervention}
        )
    model = get_reft_model(shared_copy(base), ReftConfig(representations=representations))
    model.eval()

    def forward(input_ids: torch.Tensor, **inputs: Any) -> Any:
        return model({"input_ids": input_ids, **inputs})[1]

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> torch.Tensor:
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        return model.generate(prompt, intervene_on_prompt=True, **inputs)[1]

    return Variant(forward, generate, [edit])


PEERS: dict[str, Callable[[PreTrainedModel, int], Variant]] = {
    "steering-vectors-const": steering_vectors_constant,
    "steering-vectors-gated": steering_vectors_gated,
    "repeng-const": repeng_constant,
    "repeng-gated": repeng_gated,
    "pyreft-gated": pyreft_gated,
}
"""Ways to build a peer's variant, as `variants.VARIANTS` has them for ours."""
