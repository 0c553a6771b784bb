"""Inference-time intervention: a few attention heads, those that tell prompted from plain runs, are shifted.

    theta = (mean of x over prompted runs - mean of x over plain runs) / |.|      x (head_dim,): a head's output
    sigma = standard deviation of x . theta over both
    x <- x + alpha * sigma * theta         on the K heads whose probe is the most accurate on held-out triplets

A head's output enters the output projection W_o of its attention, which is linear, so the same is done exactly by a
constant added to what W_o returns: alpha * sum over chosen heads of W_o[:, head] sigma theta. That is a PSR adapter
with a constant gate on the output projections of the layers with chosen heads; alpha is the source's own, in standard
deviations.

Source: ITI (Li et al., arXiv 2306.03341), with its "mass mean shift", which it found the best of its directions. It
took K = 48 of 1,024 heads and alpha = 15 for LLaMA-7B; K is the same share of the heads here, rounded up.

What differs. True and false statements there are prompted and plain runs of the same completions here, each edited
token being a sample; there it was the last token of each. The probe is theta with a threshold halfway between the
means, both from four fifths of the triplets, in place of logistic regression, which would need scikit-learn. Tokens
edited are those of `FitSettings`, and `FitSettings.layer` has no part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr import PSRConfig
from peft_psr.evaluation.methods.fitting.attention_heads import HeadReader, output_projections
from peft_psr.training import Triplet, TripletCollator
from peft_psr.training.data.dataset import encode_dataset
from peft_psr.training.passes.branches import psr_model

from .method import FitSettings, Fitted


SHARE_OF_HEADS = 48 / 1024
"""Of all heads, those that are shifted."""


@dataclass
class Head:
    """One attention head, as the probe sees it: number `index`, from 0, of the output projection `module`.

    `accuracy`: share of held-out tokens, of either class, that the probe tells right, 0-1, 0.5 by chance. `shift`:
    sigma * theta, (head_dim,) float64.
    """

    module: str
    index: int
    accuracy: float
    shift: torch.Tensor


def find_heads(reader: HeadReader) -> list[Head]:
    """Every head with its probe's accuracy and its shift, in two passes; `ValueError` if the runs differ at none."""
    sums: dict[tuple[str, int, bool], Any] = {}  # (module, class, held out): sum over tokens (heads, head_dim)
    counts: dict[tuple[int, bool], int] = dict.fromkeys([(0, False), (0, True), (1, False), (1, True)], 0)
    for module, label, values, held_out in reader.read():
        for out in (False, True):
            chosen = values[held_out == out].double()
            sums[module, label, out] = sums.get((module, label, out), 0.0) + chosen.sum(dim=0)
            if module == reader.modules[0]:
                counts[label, out] += len(chosen)

    def means(module: str, training_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
        parts = (False,) if training_only else (False, True)
        plain, prompted = (
            sum(sums[module, label, out] for out in parts) / sum(counts[label, out] for out in parts)
            for label in (0, 1)
        )
        return plain, prompted

    probes, shifts = {}, {}
    for module in reader.modules:
        plain, prompted = means(module, training_only=True)
        probes[module] = _unit(prompted - plain), (prompted + plain) / 2
        plain, prompted = means(module, training_only=False)
        shifts[module] = _unit(prompted - plain), (prompted + plain) / 2
    if not any(theta.any() for theta, _ in shifts.values()):
        raise ValueError("The instruction changes no attention head's mean output, so there is no direction for ITI.")

    right = {module: torch.zeros(reader.heads) for module in reader.modules}
    squares = {module: torch.zeros(reader.heads, dtype=torch.float64) for module in reader.modules}
    for module, label, values, held_out in reader.read():
        theta, middle = probes[module]
        said_prompted = ((values[held_out] - middle) * theta).sum(dim=-1) > 0
        right[module] += (said_prompted == bool(label)).sum(dim=0)
        theta, middle = shifts[module]  # the classes have as many tokens each, so this is the mean over both
        squares[module] += ((values - middle) * theta).sum(dim=-1).square().sum(dim=0)
    tokens = sum(counts.values())
    tested = counts[0, True] + counts[1, True]
    accuracy = {module: (right[module] / tested).tolist() for module in reader.modules}
    shift = {module: (squares[module] / tokens).sqrt()[:, None] * shifts[module][0] for module in reader.modules}
    return [Head(m, i, accuracy[m][i], shift[m][i]) for m in reader.modules for i in range(reader.heads)]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Each of (heads, head_dim) divided by its length; 0 stays 0."""
    return nn.functional.normalize(vectors, dim=-1, eps=torch.finfo(vectors.dtype).tiny)


@torch.no_grad()
def added_constant(projection: nn.Module, heads: Sequence[Head], count: int, dtype: torch.dtype) -> torch.Tensor:
    """What shifting heads, all of one linear output projection, changes in its output, (d,) float32.

    By the module itself, whatever the layout of its weight: W_o(shifts) - W_o(0). `count` heads enter it in all; it
    computes in `dtype`.
    """
    shift = torch.zeros(count, len(heads[0].shift), dtype=torch.float64)
    for head in heads:
        shift[head.index] = head.shift
    device = next(projection.parameters()).device
    rows = torch.stack([shift.flatten(), torch.zeros_like(shift.flatten())]).to(device, dtype)
    shifted, unshifted = projection(rows).float().cpu()
    return shifted - unshifted


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> Fitted:
    """Makes the adapter; see `Method`."""
    modules = output_projections(model)
    collator = TripletCollator(processing_class, settings.positions, alpha=1.0)
    rows = [row for row in encode_dataset(collator, triplets, "triplets") if not row["neutral"]]
    if len(rows) < 2:
        raise ValueError(
            f"ITI needs at least two triplets with an instruction, one to hold out, and {len(rows)} of "
            f"{len(triplets)} have one in their `steered_prompt`."
        )
    model.eval()
    reader = HeadReader(model, modules, collator, rows, settings)
    heads = find_heads(reader)
    best = sorted(heads, key=lambda head: -head.accuracy)[: math.ceil(SHARE_OF_HEADS * len(heads))]
    by_module = {module: [head for head in best if head.module == module] for module in modules}
    chosen = {module: there for module, there in by_module.items() if there}
    constants = {
        module: added_constant(model.get_submodule(module), there, reader.heads, model.dtype)
        for module, there in chosen.items()
    }
    config = PSRConfig(
        gate="constant", target_modules=list(chosen), positions=settings.positions, task_type=TaskType.CAUSAL_LM
    )
    steered = get_peft_model(model, config)
    with torch.no_grad():
        for layer in psr_model(steered).psr_layers().values():
            layer.unit("default").direction.copy_(constants[layer.name])
    described = [
        {
            "module": h.module,
            "head": h.index,
            "accuracy": round(h.accuracy, 4),
            "sigma": round(h.shift.norm().item(), 6),
        }
        for h in best
    ]
    return Fitted(steered.eval(), notes={"heads": described, "heads_in_all": len(heads)})
