"""Every objective by its name, as recipes and `PSRTrainingArguments` give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_psr.registry import Registry


if TYPE_CHECKING:
    from .objective import Objective


OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "mse": "peft_psr.training.objectives.mse:MSE",
        "ll": "peft_psr.training.objectives.ll:LL",
        "kl": "peft_psr.training.objectives.kl:KL",
    },
)
"""A sum of objectives is added up in this order."""
