"""Every way to start by its name, as recipes and `initialize_psr_weights` give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_psr.registry import Registry


if TYPE_CHECKING:
    from .start import Start


STARTS: Registry[Start] = Registry(
    "start",
    {
        "linear": "peft_psr.training.starts.start:LINEAR",
        "live": "peft_psr.training.starts.start:LIVE",
        "mean_difference": "peft_psr.training.starts.mean_difference:MEAN_DIFFERENCE",
        "ridge": "peft_psr.training.starts.ridge:RIDGE",
    },
)
