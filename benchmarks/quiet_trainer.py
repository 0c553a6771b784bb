"""A trainer that prints nothing, for the benchmarks of training."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from peft_psr.training import PSRTrainer, PSRTrainingArguments
from peft_psr.training.trainer.step_progress import silence


def trainer_of(model: PeftModel, train: Any, held_out: Any, tokenizer, folder: str, **settings: Any) -> PSRTrainer:
    """A quiet trainer."""
    settings = {
        "per_device_eval_batch_size": 32,
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    made = PSRTrainer(
        model, PSRTrainingArguments(output_dir=folder, **settings), train, held_out, processing_class=tokenizer
    )
    silence(made)
    return made
