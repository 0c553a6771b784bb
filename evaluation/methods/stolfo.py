"""The stream's projection on an instruction's direction, set to its mean under the instruction; no training.

    u = mean(A_l(x') - A_l(x)) / |.|        c = mean(A_l(x') . u)        both at the last token of the prompts
    h <- h + alpha * (c - h . u) u

At alpha = 1 the projection is c whatever it was; 0.5 goes half of the way. As a PSR adapter of rank 2 it is exact,
since x = ReLU(x) - ReLU(-x):

    h <- h + alpha * (ReLU(c - h . u) u + ReLU(h . u - c) (-u))

Source: Stolfo et al., arXiv 2410.12877 (ICLR 2025), their steering for format instructions. What differs: they edit
every token and choose the layer for each instruction by validation; here the tokens and the layer are those of
`FitSettings`, as for every other method.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.methods.fitting.contrast import contrast_pairs, last_token_stream
from peft_psr.evaluation.methods.fitting.edit_training import single_layer
from peft_psr.training import Triplet
from peft_psr.unit import PSRUnit

from .method import FitSettings, Fitted


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> Fitted:
    """Makes the adapter; see `Method`."""
    pairs = contrast_pairs(triplets, processing_class)
    done, batches = 0, 2 * -(-len(pairs) // settings.batch_size)

    def on_batch() -> None:
        nonlocal done
        done += 1
        if settings.on_step is not None:
            settings.on_step(done, batches)

    plain, prompted = (
        last_token_stream(model, processing_class, prompts, settings.layer, settings.batch_size, on_batch).double()
        for prompts in zip(*pairs, strict=True)
    )
    difference = (prompted - plain).mean(dim=0)
    if not difference.any():
        raise ValueError(
            f"The instructions change nothing at the last prompt token of layer {settings.layer}, on the mean of "
            f"{len(pairs)} pairs of prompts, so there is no direction. Choose another layer."
        )
    u = difference / difference.norm()
    steered, unit = single_layer(model, settings, r=2)
    target = (prompted @ u).mean()
    set_projection(unit, u, target)
    notes = {"pairs": len(pairs), "projection_prompted": target.item(), "projection_plain": (plain @ u).mean().item()}
    return Fitted(steered, notes=notes)


@torch.no_grad()
def set_projection(unit: PSRUnit, u: torch.Tensor, target: torch.Tensor) -> None:
    """Weights of rank 2, with ReLU gates, that set the projection on a unit vector, (d,), to `target`, ()."""
    assert unit.gate_weight is not None and unit.gate_bias is not None
    unit.gate_weight.copy_(torch.stack([-u, u]))
    unit.gate_bias.copy_(torch.stack([target, -target]))
    unit.direction.copy_(torch.stack([u, -u]))
