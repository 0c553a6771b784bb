"""A steering vector trained by RePS: one vector z, added to every edited token.

    steered:  h + strength * z                       nulled:  h - ReLU(h . z) z / |z|^2

Source: Wu et al., arXiv 2505.20809, and its authors' code in AxBench for the nulled run and the start, which is a
linear layer's. `preference.py` has the objective and says what of it is ours. Ours besides: no bias on the strength.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.methods.fitting.edit_training import single_layer
from peft_psr.evaluation.methods.fitting.preference import train_by_preference
from peft_psr.training import Triplet
from peft_psr.training.passes.branches import unedited

from .method import FitSettings, Fitted


LEARNING_RATE = 5e-2


class SteeringVector(nn.Module):
    """z, (d,) float32, uniform within +-1/sqrt(d) at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width).uniform_(-(width**-0.5), width**-0.5))

    def steer(self, hidden: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """What the steered run adds to `hidden` (batch, seq, d): (batch, 1, d)."""
        return strength * self.vector

    def null(self, hidden: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """What takes the vector's positive part out of `hidden` (batch, seq, d); the strength plays no part."""
        return -(hidden @ self.vector).relu()[..., None] * self.vector / self.vector.square().sum()


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> Fitted:
    """Makes the adapter; see `Method`."""
    torch.manual_seed(settings.seed)
    steered, unit = single_layer(model, settings, gate="constant")
    vector = SteeringVector(unit.direction.shape[1])
    with unedited(steered):
        left_out = train_by_preference(
            steered, processing_class, vector, vector.steer, vector.null, triplets, settings, LEARNING_RATE
        )
    with torch.no_grad():
        unit.direction.copy_(vector.vector[None])
    return Fitted(steered, notes={"triplets_left_out": left_out})
