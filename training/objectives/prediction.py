"""The objectives on what the model predicts: from its last layer's outputs by its own head, or from its logits."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from peft import PeftModel

from peft_psr.base_model.decoder import text_config
from peft_psr.training.passes.branches import Batch, Branch, unedited
from peft_psr.training.passes.partial import predict

from .losses import kl_loss, likelihood_loss, response_targets


def prediction_losses(
    model: PeftModel,
    objectives: Collection[str],
    student: Branch,
    last: str,
    prompted: torch.Tensor | None,
    batch: Batch,
) -> dict[str, torch.Tensor]:
    """The losses "ll" and "kl" of a batch.

    Args:
        model: The PEFT model.
        objectives: Which are wanted; others are passed over.
        student: The steered model's pass; its logits are used if it has them, else its last layer's output.
        last: Name of the last decoder layer.
        prompted: The same of the prompted model at the masked tokens, (tokens, vocabulary) or (tokens, d); for "kl".
        batch: The batch.

    Returns:
        {objective: (batch,)}.
    """
    mask = batch["steering_mask"]
    vocabulary = text_config(model.get_base_model()).vocab_size
    targets = response_targets(batch["labels"], mask)
    if student.logits is not None:
        steered, head, prompted_head = student.logits[mask.bool()], _itself, _itself
    else:
        steered = student.hidden[last]
        head = partial(predict, model, layers_pattern=model.active_peft_config.layers_pattern)
        prompted_head = partial(_predict_unedited, model, head)
    losses = {}
    if "ll" in objectives:
        losses["ll"] = likelihood_loss(head, steered, targets, mask, vocabulary)
    if "kl" in objectives:
        assert prompted is not None
        losses["kl"] = kl_loss(head, steered, prompted, targets, mask, vocabulary, prompted_head)
    return losses


def _itself(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _predict_unedited(model: PeftModel, head, hidden: torch.Tensor) -> torch.Tensor:
    """By the head as it was, without what `modules_to_save` trains of it."""
    with unedited(model):
        return head(hidden)
