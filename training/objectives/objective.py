"""What an objective is, and what it is shown: both branches' passes over one batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from peft import PeftModel

from peft_psr.training.data.collator import Batch
from peft_psr.training.passes.branches import Branch

from .prediction import Prediction, prediction_of


@dataclass
class Passes:
    """One batch as the prompted and the steered model have gone over it."""

    model: PeftModel  # the PEFT model
    batch: Batch  # from `TripletCollator`, on the model's device
    layers: Sequence[str]  # names of the decoder layers that an edit can change: from the first edited one on
    student: Branch  # the steered model's pass, with its graph
    # {layer name: (tokens, d)} of the prompted model, at the layers that the objectives look at
    teacher: Mapping[str, torch.Tensor] = field(default_factory=dict)
    adapters: Sequence[str] = ()  # names of the adapters that are trained, as `batch["adapter"]` counts them
    # of the prompted model at the masked tokens, (tokens, vocabulary), where they came with the forward call and
    # something looks at them
    prompted_logits: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """(batch, seq), the tokens that are edited and compared."""
        return self.batch["steering_mask"]

    @cached_property
    def prediction(self) -> Prediction:
        """What both models predict from their last layer."""
        last, prompted = self.layers[-1], self.prompted_logits
        prompted = self.teacher.get(last) if prompted is None else prompted
        return prediction_of(self.model, self.batch, self.student, last, prompted)


class Objective(ABC):
    """One way to say how far the steered model is from doing what the prompt does.

    A new one is a subclass in a file of its own and a line in `registry.py`, or `OBJECTIVES.add(name, object)`.

    Attributes:
        epochs: Passes over the triplets where nobody says how many.
        layers: Where it looks at the prompted model's activations: at "all" decoder layers that an edit can change, at
            the "last", or at "none", which learns from the answers' text alone.
        needs_logits: It looks at what is predicted, so a sharded model has to give its logits with the forward call.
    """

    epochs: float = 15.0
    layers: Literal["all", "last", "none"]
    needs_logits: bool = False

    @abstractmethod
    def loss(self, passes: Passes) -> torch.Tensor | dict[str, torch.Tensor]:
        """One number a triplet, (batch,) float32; where it looks at "all" layers {layer name: (batch,)}.

        These are summed, or scaled as `normalize_loss` says; logs show them one by one.
        """


def layers_looked_at(objectives: Iterable[Objective], layers: Sequence[str]) -> list[str]:
    """Those of the decoder layers at which some objective looks at the prompted model's activations."""
    wanted = {objective.layers for objective in objectives}
    return list(layers) if "all" in wanted else list(layers[-1:]) if "last" in wanted else []
