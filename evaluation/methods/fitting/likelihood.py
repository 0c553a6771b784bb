"""Training any PEFT adapter by likelihood, with transformers' `Trainer`.

    loss = mean over the tokens of y' in a batch of -log p(y'_i | x, y'_{<i})

AdamW without weight decay, learning rate linear to zero, gradients clipped at norm 1. x is the bare prompt; the prompt
with the instruction is never read.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.training import Triplet, TripletCollator
from peft_psr.training.data.dataset import encode_dataset

from .trainer_settings import text_arguments, train_quietly


def train_by_likelihood(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
    learning_rate: float,
) -> None:
    """Train the active adapter at a first learning rate, on the same machine always to the same weights.

    Of the triplets `steered_prompt` does not matter; of the settings seed, epochs (the second number), batch size and
    `on_step` are heeded. `FloatingPointError` if the loss is not finite.
    """
    collator = TripletCollator(processing_class, alpha=1.0)
    rows = encode_dataset(collator, triplets, "triplets")

    def collate(features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collator(features)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    with TemporaryDirectory() as folder:
        arguments = text_arguments(
            folder,
            model,
            settings,
            learning_rate,
            train_sampling_strategy="group_by_length",
            logging_nan_inf_filter=False,
        )
        trainer = Trainer(model, arguments, collate, rows)  # type: ignore[arg-type]
        loss = train_quietly(trainer, settings.on_step)
    if not isfinite(loss):
        raise FloatingPointError(f"The loss became {loss}; try a learning rate below {learning_rate}.")
