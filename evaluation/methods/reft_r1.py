"""ReFT-r1: one direction that both finds the trait in a response and adds it.

    a_i   =  ReLU(h_i . w)                            |w| = 1; latents of the edited tokens
    h_i   <- h_i + mean(top-k of a) * w               while training, by the likelihood of y'; k = 8
    loss  =  -1/|y'| log p(y' | x) + 0.005 * t * mean over tokens of the a_i that are not among the top k
    h_i   <- h_i + alpha * s * w                      afterwards: a constant vector

t: share of training done (0-1).

Source: Wu et al., arXiv 2501.17148, and its authors' AxBench code (there: LsReFT), which has k, the penalty and its
growth, and no bias; the top k are taken over the whole sequence, so training looks ahead. Ours: only edited tokens
count; s is the mean, over training rows, of mean(top-k of a) in the plain model, which is about what training added
(that code takes the largest a on other data and searches alpha besides); w is a normalised weight (there: set to norm
1 after each step); the sign that w starts with is the one with the larger latents, so that it does not start dead; no
rows without the trait; the addition is weighted by `FitSettings.alpha`.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.methods.fitting.edit_training import mean_log_likelihood, single_layer, train_edit
from peft_psr.training import Triplet, TripletCollator
from peft_psr.training.data.collator import Batch, to_device
from peft_psr.training.data.dataset import Row, encode_dataset
from peft_psr.training.passes.branches import unedited

from .method import FitSettings, Fitted


LEARNING_RATE = 1e-2
TOP_K = 8
PENALTY = 0.005


def top_latents(latents: torch.Tensor, mask: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each row's k largest latents, and the sum of the others over the number of tokens; (batch,) each.

    Latents are (batch, seq), >= 0. Tokens of `mask`, (batch, seq), count; if they are fewer than k, all are the
    largest.
    """
    latents = latents * mask
    counts = mask.sum(dim=1)
    largest = latents.topk(min(k, latents.shape[1]), dim=1).values.sum(dim=1)  # masked ones add nothing
    return largest / counts.clamp(max=k), (latents.sum(dim=1) - largest) / counts


class ReFTr1(nn.Module):
    """w before it is made a unit vector, (d,) float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width).uniform_(-(width**-0.5), width**-0.5))

    @property
    def direction(self) -> torch.Tensor:
        """The unit vector w, (d,)."""
        return F.normalize(self.vector, dim=0)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sizes of the additions and penalties, (batch,) each, for `hidden` (batch, seq, d)."""
        return top_latents((hidden @ self.direction).relu(), mask, TOP_K)


@torch.no_grad()
def _mean_size(model: PeftModel, collator: TripletCollator, rows: Sequence[Row], edit: ReFTr1, size: int) -> float:
    """Mean over the rows of mean(top-k of a) in the plain model."""
    sizes: list[torch.Tensor] = []
    for start in range(0, len(rows), size):
        batch = to_device(collator(rows[start : start + size]), model.device)

        def look(hidden: torch.Tensor, batch: Batch = batch) -> torch.Tensor:
            sizes.append(edit(hidden, batch["steering_mask"])[0])
            return torch.zeros_like(hidden)

        mean_log_likelihood(model, batch, look)
    return torch.cat(sizes).mean().item()


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> Fitted:
    """Makes the adapter; see `Method`."""
    torch.manual_seed(settings.seed)
    steered, unit = single_layer(model, settings, gate="constant")
    edit = ReFTr1(unit.direction.shape[1]).to(steered.device)
    collator = TripletCollator(processing_class, settings.positions, settings.alpha)
    rows = encode_dataset(collator, triplets, "triplets")

    def loss(batch: Batch, progress: float) -> torch.Tensor:
        penalties: list[torch.Tensor] = []

        def add(hidden: torch.Tensor) -> torch.Tensor:
            size, penalty = edit(hidden, batch["steering_mask"])
            penalties.append(penalty)
            return (batch["alpha"] * size)[:, None, None] * edit.direction

        likelihood = mean_log_likelihood(steered, batch, add)
        return PENALTY * progress * penalties[0] - likelihood

    mean_size = partial(_mean_size, steered, collator, rows, edit, settings.batch_size)
    with unedited(steered):
        before = mean_size()
        edit.vector.data.neg_()
        if mean_size() < before:
            edit.vector.data.neg_()
        train_edit(steered, edit, loss, rows, collator, settings, LEARNING_RATE)
        size = mean_size()
    with torch.no_grad():
        unit.direction.copy_((size * edit.direction)[None])
    return Fitted(steered, notes={"addition": size})
