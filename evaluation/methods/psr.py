"""Methods of the paper and our own: PSR adapters trained on triplets by `PSRTrainer`."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr import PSRConfig
from peft_psr.evaluation.methods.fitting.trainer_settings import train_quietly
from peft_psr.training import PSRTrainer, PSRTrainingArguments, Triplet, initialize_psr_weights
from peft_psr.training.starts.registry import STARTS
from peft_psr.training.starts.start import DataStart
from peft_psr.training.trainer.arguments import learns_from_text

from .method import FitSettings, Fitted


LEARNING_RATE = 5e-3


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
    gate: str,
    all_layers: bool,
    objective: str | dict[str, float],
    start: str = "live",
    r: int = 1,
    learning_rate: float = LEARNING_RATE,
) -> Fitted:
    """Trains a PSR adapter of rank `r`, of one layer or all, with `gate` "relu" or "constant"; see `Method`.

    The objective is one that `PSRTrainingArguments` takes, the start one of `STARTS`; `learning_rate` counts unless
    the settings have another.
    """
    torch.manual_seed(settings.seed)
    config = PSRConfig(
        r=r,
        gate=gate,
        layers_to_transform=None if all_layers else settings.layer,
        positions=settings.positions,
        init_weights=STARTS[start].init_weights,
    )
    steered = get_peft_model(model, config)
    if isinstance(STARTS[start], DataStart):
        initialize_psr_weights(steered, triplets, start, processing_class=processing_class, progress=False)
    with TemporaryDirectory() as folder:
        arguments = PSRTrainingArguments(
            output_dir=folder,
            objective=objective,
            alpha=settings.alpha,
            num_train_epochs=settings.epochs[learns_from_text(objective)],
            learning_rate=settings.learning_rate or learning_rate,
            per_device_train_batch_size=settings.batch_size,
            train_sampling_strategy="group_by_length",
            seed=settings.seed,
            data_seed=settings.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = PSRTrainer(steered, arguments, triplets, processing_class=processing_class)
        train_quietly(trainer, settings.on_step)
    return Fitted(steered.eval(), trainer.dead_gates)
