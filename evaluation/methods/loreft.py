"""LoReFT: in a learned subspace of a few dimensions, the stream is replaced by a linear function of itself.

    h  <-  h + alpha * R^T (W h + b - R h)          R: (r, d), orthonormal rows; W: (r, d); b: (r,); r = 4

Trained by the likelihood of y', or by RePS. Afterwards it is, exactly, a PSR adapter of rank 2r: with
g = (W - R) h + b, (ReLU(g) - ReLU(-g)) R = g R.

Source: Wu et al., arXiv 2404.03592; the rank and the start (R orthogonal, W and b a linear layer's) are those of its
authors' AxBench code. Ours: one layer, and every token that `positions` names (theirs: some first and last prompt
tokens, on several layers); under RePS (arXiv 2505.20809) strength -s where the steered run has s in place of the
nulled run, which is one of two ways in that code, the other being no edit at all. What the paper itself does for
LoReFT there could not be established.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.methods.fitting.edit_training import mean_log_likelihood, single_layer, train_edit
from peft_psr.evaluation.methods.fitting.preference import train_by_preference
from peft_psr.training import Triplet, TripletCollator
from peft_psr.training.data.collator import Batch
from peft_psr.training.data.dataset import encode_dataset
from peft_psr.training.passes.branches import unedited
from peft_psr.unit import PSRUnit

from .method import FitSettings, Fitted


RANK = 4
LEARNING_RATES = {"ll": 5e-3, "reps": 5e-3}
"""{objective: learning rate}."""


class LoReFT(nn.Module):
    """R (`rotation`), W and b (`source`), float32, for a stream of `width` d and the `rank` r."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.rotation = orthogonal(nn.Linear(width, rank, bias=False))
        self.source = nn.Linear(width, rank)

    def steer(self, hidden: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """What is added, strength * R^T (W h + b - R h), for `hidden` (batch, seq, d)."""
        return strength * ((self.source(hidden) - self.rotation(hidden)) @ self.rotation.weight)

    def reverse(self, hidden: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """The same at the opposite strength."""
        return self.steer(hidden, -strength)

    @torch.no_grad()
    def write(self, unit: PSRUnit) -> None:
        """Set the weights of a PSR adapter with ReLU gates, of rank 2r, to the same edit."""
        assert unit.gate_weight is not None and unit.gate_bias is not None
        rotation = cast(torch.Tensor, self.rotation.weight)
        weight, bias = self.source.weight - rotation, self.source.bias
        unit.gate_weight.copy_(torch.cat([weight, -weight]))
        unit.gate_bias.copy_(torch.cat([bias, -bias]))
        unit.direction.copy_(torch.cat([rotation, -rotation]))


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
    objective: Literal["ll", "reps"],
) -> Fitted:
    """Makes a LoReFT, trained by an objective; see `Method`."""
    torch.manual_seed(settings.seed)
    steered, unit = single_layer(model, settings, r=2 * RANK)
    edit = LoReFT(unit.direction.shape[1], RANK)
    notes = {}
    with unedited(steered):
        if objective == "ll":
            _train_by_likelihood(steered, processing_class, edit, triplets, settings)
        else:
            rate = LEARNING_RATES[objective]
            notes["triplets_left_out"] = train_by_preference(
                steered, processing_class, edit, edit.steer, edit.reverse, triplets, settings, rate
            )
    edit.write(unit)
    return Fitted(steered, notes=notes)


def _train_by_likelihood(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    edit: LoReFT,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> None:
    collator = TripletCollator(processing_class, settings.positions, settings.alpha)

    def loss(batch: Batch, progress: float) -> torch.Tensor:
        strength = batch["alpha"][:, None, None]
        return -mean_log_likelihood(model, batch, lambda hidden: edit.steer(hidden, strength))

    rows = encode_dataset(collator, triplets, "triplets")
    train_edit(model, edit, loss, rows, collator, settings, LEARNING_RATES["ll"])
