"""RePS, reference-free preference steering: the objective, for any edit of one layer.

    Delta+ = beta+ / |y'| log p(y' | x; steered) - 1 / |y|  log p(y  | x; steered)
    Delta- = beta- / |y|  log p(y  | x; nulled)  - 1 / |y'| log p(y' | x; nulled)
    beta+  = max(log p(y | x) - log p(y' | x), 1)       beta- = max(log p(y' | x) - log p(y | x), 1)
    loss   = -log sigmoid(Delta+) - log sigmoid(Delta-)

y' is the triplet's response, y the model's own to the bare prompt; beta knows the plain model, by likelihoods summed
over tokens, and has no gradient. The steered run has a strength drawn anew for each pair at each step.

Source: Wu et al., arXiv 2505.20809, through a summary of its equations, and its authors' code in AxBench. Theirs: the
formula; the strengths, drawn from 2, 4, ..., 10 (there for y' and y apart, here once for both). Ours: these strengths
divided by their mean, so that 1 is what was trained at, and multiplied by what `FitSettings.alpha` says; division by
the response's length, as the formula has it (their code divides by that of prompt and response together); no dropout.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.training import Triplet, TripletCollator, sample_completions
from peft_psr.training.data.collator import Batch, to_device
from peft_psr.training.data.dataset import Row, encode_dataset

from .edit_training import mean_log_likelihood, train_edit


STRENGTHS = tuple(strength / 6 for strength in (2, 4, 6, 8, 10))
"""What the strength of the steered run is drawn from; mean 1."""

Pair = tuple[Row, Row, float]
"""The rows of y' and of y, and log p(y' | x) - log p(y | x) under the plain model."""


class PairBatch(Batch):
    """The rows of y', then those of y; the edit's strength, (batch, 1, 1), and each pair's advantage, (pairs,)."""

    strength: torch.Tensor
    advantage: torch.Tensor


ScaledEdit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the layer's output (batch, seq, d) and strengths (batch, 1, 1) to what is added."""


def preference_loss(
    steered: tuple[torch.Tensor, torch.Tensor], nulled: tuple[torch.Tensor, torch.Tensor], advantage: torch.Tensor
) -> torch.Tensor:
    """The objective of each pair, (pairs,), above 0.

    `steered`: log p(y' | x) / |y'| and log p(y | x) / |y| under the steered model, (pairs,) each; `nulled`: the same
    where the edit is taken out; `advantage`: log p(y' | x) - log p(y | x) under the plain model, summed over tokens,
    (pairs,).
    """
    positive = (-advantage).clamp(min=1) * steered[0] - steered[1]
    negative = advantage.clamp(min=1) * nulled[1] - nulled[0]
    return -F.logsigmoid(positive) - F.logsigmoid(negative)


def train_by_preference(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    module: nn.Module,
    steer: ScaledEdit,
    null: ScaledEdit,
    triplets: Sequence[Triplet],
    settings: FitSettings,
    learning_rate: float,
) -> int:
    """Train an edit of a PSR adapter's layer, the adapter switched off, by RePS, in place.

    `module` holds what is trained, `steer` and `null` are the edits of the steered and the nulled run. Returns how
    many triplets were left out since no y could be put behind their prompt; `ValueError` if one can't be used, or none
    is left.
    """
    collator = TripletCollator(processing_class, settings.positions, settings.alpha)
    pairs = _pairs(model, processing_class, collator, triplets, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    strengths = torch.tensor(STRENGTHS)

    def collate(pairs: Sequence[Pair]) -> PairBatch:
        batch = collator([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
        drawn = strengths[torch.randint(len(strengths), (len(pairs),), generator=generator)]
        return {
            **batch,
            "strength": (drawn.repeat(2) * batch["alpha"])[:, None, None],
            "advantage": torch.tensor([pair[2] for pair in pairs]),
        }

    def loss(batch: Batch, progress: float) -> torch.Tensor:
        both = cast(PairBatch, batch)

        def likelihoods(edit: ScaledEdit) -> tuple[torch.Tensor, torch.Tensor]:
            wanted, plain = mean_log_likelihood(model, batch, lambda hidden: edit(hidden, both["strength"])).chunk(2)
            return wanted, plain

        return preference_loss(likelihoods(steer), likelihoods(null), both["advantage"])

    train_edit(model, module, loss, pairs, collate, settings, learning_rate)
    return len(triplets) - len(pairs)


def _pairs(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    collator: TripletCollator,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> list[Pair]:
    """Every triplet's y' beside a y of the model's own, no longer than the longest y'."""
    wanted = encode_dataset(collator, triplets, "triplets")
    longest = max(len(row["input_ids"]) - row["prompt_length"] for row in wanted)
    drawn = sample_completions(
        model, processing_class, [triplet["prompt"] for triplet in triplets], longest, seed=settings.seed
    )
    both: list[tuple[Row, Row]] = []
    error: ValueError | None = None
    for row, triplet, answer in zip(wanted, triplets, drawn, strict=True):
        try:
            own = {"completion": answer.text, "truncated": answer.truncated, "completion_ids": answer.ids}
            plain = collator.encode({**triplet, **own})
        except ValueError as unusable:  # it is empty, or its start merges with the end of the prompt
            error = unusable
        else:
            both.append((row, plain))
    if not both:
        raise ValueError(f"None of the model's own answers to the bare prompts can be used: {error}") from error
    scores = [_log_likelihoods(model, collator, rows, settings.batch_size) for rows in zip(*both, strict=True)]
    return [(row, plain, p - q) for (row, plain), p, q in zip(both, *scores, strict=True)]


@torch.no_grad()
def _log_likelihoods(model: PeftModel, collator: TripletCollator, rows: Sequence[Row], batch_size: int) -> list[float]:
    """What log p(y | x) is for each row under the plain model, summed over tokens."""
    sums: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = to_device(collator(rows[start : start + batch_size]), model.device)
        sums += (mean_log_likelihood(model, batch) * (batch["labels"] != -100).sum(dim=1)).tolist()
    return sums
