"""From a training recipe to its parts: configuration, arguments, base model with its adapters, trainer, checkpoint."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed
from transformers.integrations import TensorBoardCallback

from peft_psr.config import PSRConfig
from peft_psr.files import read_json
from peft_psr.training.data.triplets import Triplet
from peft_psr.training.starts.initialization import initialize_psr_weights
from peft_psr.training.starts.registry import STARTS
from peft_psr.training.starts.start import DataStart
from peft_psr.training.trainer.arguments import PSRTrainingArguments
from peft_psr.training.trainer.step_progress import StepProgress, silence
from peft_psr.training.trainer.trainer import PSRTrainer

from .recipe import TrainRecipe


logger = logging.getLogger(__name__)


def make_config(recipe: TrainRecipe) -> PSRConfig:
    """Returns the configuration of every adapter of a recipe."""
    layers = recipe.layers_to_transform
    return PSRConfig(
        r=recipe.r,
        gate=recipe.gate,
        layers_to_transform=list(layers) if isinstance(layers, tuple) else layers,
        positions=recipe.positions,
        init_weights=STARTS[recipe.start].init_weights,
        revision=recipe.revision,
    )


def make_arguments(recipe: TrainRecipe, folder: Path) -> PSRTrainingArguments:
    """Returns the arguments of a recipe, with checkpoints in `folder`.

    Raises `ValueError` if this machine can't do what the recipe asks for, such as `bf16`.
    """
    by_steps = recipe.checkpoint_steps is not None
    interval: dict[str, Any] = dict.fromkeys(("save_steps", "eval_steps"), recipe.checkpoint_steps) if by_steps else {}
    when = "steps" if by_steps else "epoch"
    return PSRTrainingArguments(
        output_dir=str(folder.resolve()),
        objective=recipe.objective,
        normalize_loss=recipe.normalize_loss,
        regularizer=recipe.regularizer,
        alpha=recipe.alpha,
        neutral_weight=recipe.neutral_weight,
        norm_penalty=recipe.norm_penalty,
        teacher_cache=recipe.teacher_cache,
        teacher_cache_gb=recipe.teacher_cache_gb,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=PartialState().device.type == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        # the order inside an epoch can be had again only where it begins
        train_sampling_strategy="random" if by_steps or recipe.batch_size == 1 else "group_by_length",
        report_to=recipe.report_to,
        logging_steps=0.01,  # of all steps
        save_strategy=when,
        eval_strategy=when if recipe.eval_share else "no",
        **interval,
        save_total_limit=None if recipe.keep_checkpoints else 2,
        load_best_model_at_end=recipe.early_stopping is not None,
        metric_for_best_model="eval_loss" if recipe.early_stopping else None,
        greater_is_better=False if recipe.early_stopping else None,
        restore_callback_states_from_checkpoint=True,
    )


def add_adapters(base: Any, recipe: TrainRecipe, adapters: Sequence[str]) -> PeftModel:
    """Puts adapters on a base model, each as it would begin alone."""
    model = None
    for name in adapters:
        set_seed(recipe.seed)
        if model is None:
            model = get_peft_model(base, make_config(recipe), adapter_name=name)
        else:
            model.add_adapter(name, make_config(recipe))
    assert model is not None
    return model


def start_from_data(
    model: PeftModel,
    recipe: TrainRecipe,
    triplets: Mapping[str, Sequence[Triplet]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Sets each adapter's weights from its triplets, if the recipe begins so; raises as `initialize_psr_weights`."""
    if not isinstance(STARTS[recipe.start], DataStart):
        return
    shown = PartialState().is_main_process
    for name, rows in triplets.items():
        model.set_adapter(name)
        initialize_psr_weights(model, rows, recipe.start, processing_class=tokenizer, progress=shown)


def make_trainer(
    model: PeftModel,
    recipe: TrainRecipe,
    arguments: PSRTrainingArguments,
    train: Mapping[str, Sequence[Triplet]],
    held_out: Mapping[str, Sequence[Triplet]],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    logs: Path,
) -> PSRTrainer:
    """Returns a trainer with a bar, and with early stopping and TensorBoard if the recipe asks for them.

    `train`, and `held_out` where the recipe has a held-out loss, are {adapter: triplets}; `title` is what the bar
    calls
    the training, `logs` the folder for TensorBoard.
    """
    name = model.active_adapter
    trainer = PSRTrainer(
        model,
        arguments,
        train if recipe.parallel else train[name],
        None if not recipe.eval_share else held_out if recipe.parallel else held_out[name],
        processing_class=tokenizer,
    )
    silence(trainer)
    if trainer.is_world_process_zero():
        trainer.add_callback(StepProgress(title))
    if recipe.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(logs)
    return trainer


def last_checkpoint(folder: Path, patience: int | None) -> Path | None:
    """The newest whole checkpoint after which there is something left to do; later ones are removed.

    transformers would train beyond the end if it went on from the last checkpoint of a run.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for path in found:
        try:  # the last file that is written
            state = read_json(path / "trainer_state.json")
        except (OSError, ValueError):
            state = None
        if state is not None and not _has_ended(state, patience):
            return path
        if PartialState().is_main_process:
            shutil.rmtree(path, ignore_errors=True)
    return None


def _has_ended(state: Mapping[str, Any], patience: int | None) -> bool:
    stopping = state["stateful_callbacks"].get("EarlyStoppingCallback", {}).get("attributes", {})
    waited = stopping.get("early_stopping_patience_counter", 0)
    return state["global_step"] >= state["max_steps"] or (patience is not None and waited >= patience)
