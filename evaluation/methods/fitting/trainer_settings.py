"""What methods share when transformers' `Trainer` trains them: settings, silence, steps told to whoever asks."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.training.trainer.step_progress import silence


class StepCallback(TrainerCallback):
    """Tells `on_step` the steps done and those in all."""

    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Say it."""
        self.on_step(state.global_step, state.max_steps)


def train_quietly(trainer: Trainer, on_step: Callable[[int, int], None] | None) -> float:
    """Train without printing, `on_step` told the steps done and those in all; returns the mean training loss."""
    silence(trainer)
    if on_step is not None:
        trainer.add_callback(StepCallback(on_step))
    return trainer.train().training_loss


def text_arguments(
    folder: str, model: PeftModel, settings: FitSettings, learning_rate: float, **more: Any
) -> TrainingArguments:
    """The settings of objectives on text: AdamW without weight decay, linear to zero, gradients clipped at norm 1.

    Of `settings` epochs (the second number), batch size and seed are heeded; `more` are other fields. `ValueError` if
    the process would spread the model over several GPUs with `nn.DataParallel`.
    """
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs[1],
        learning_rate=learning_rate,
        per_device_train_batch_size=settings.batch_size,
        seed=settings.seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        **more,
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"This process sees {arguments.n_gpu} GPUs and would take {arguments.n_gpu} times the batch; let it see "
            "one (CUDA_VISIBLE_DEVICES=0)."
        )
    return arguments
