"""What a start is: how an adapter's weights are set before its first gradient step."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .regression import Edit, Moments


@dataclass(frozen=True)
class Start:
    """A start that `PSRConfig` makes by itself.

    Attributes:
        init_weights: The configuration's field: True for a no-op with open gates, False for random weights.
    """

    init_weights: bool = True


LINEAR = Start(init_weights=False)
"""At random as a linear layer begins, as the reported runs did."""
LIVE = Start(init_weights=True)
"""A no-op with open gates."""


@dataclass(frozen=True)
class Wanted:
    """What edit is wanted at a layer."""

    r: int  # its rank
    gated: bool  # it has ReLU gates; if not, they are constant at 1
    strength: float | None = None  # of a penalty on the gates' weights, where the user gives one
    # z (r, d) to use as they are but for length and sign, where the user gives them
    directions: torch.Tensor | None = None


class DataStart(Start, ABC):
    """A start from triplets, layer by layer: see `initialize_psr_weights`.

    A new one is a subclass in a file of its own and a line in `registry.py`, or `STARTS.add(name, object)`.
    """

    def folds(self, wanted: Wanted) -> int:
        """Into how many disjoint sets of triplets the tokens are to be summed up, for what is held out."""
        return 1

    @abstractmethod
    def edit(self, folds: Sequence[Moments], wanted: Wanted) -> Edit:
        """The edit of a layer whose gates read A and which is to add D, from sums over the tokens of each fold."""
