"""The mean of what is missing at a layer, behind open gates: on a constant gate DiM, the paper's; CAA-like."""

from collections.abc import Sequence

import torch

from .regression import Edit, Moments, Regression
from .start import DataStart, Wanted


class MeanDifference(DataStart):
    """The start "mean_difference"."""

    def edit(self, folds: Sequence[Moments], wanted: Wanted) -> Edit:
        """Z = mean(D) with w = 0, b = 1, or its part along directions that are given."""
        total, z = sum(folds[1:], folds[0]), wanted.directions
        return mean_edit(total, wanted.r) if z is None else mean_gates(total, z)


MEAN_DIFFERENCE = MeanDifference()


def mean_edit(moments: Moments, r: int) -> Edit:
    """The mean difference behind a gate that is open at 1; further ranks have a direction of 0."""
    first = moments.mean_difference[None]
    weight, bias = first[:0], first[:0, 0]
    if r > 1:
        weight, bias = Regression(moments).waiting_gates(r - 1)
    return Edit(
        torch.cat([torch.zeros_like(first), weight]),
        torch.cat([bias.new_ones(1), bias]),
        torch.cat([first, torch.zeros_like(weight)]),
    )


def mean_gates(moments: Moments, z: torch.Tensor) -> Edit:
    """The part of the mean difference that lies in given directions z (r, d), behind gates that are open at 1."""
    scaled = z * (moments.mean_difference @ torch.linalg.pinv(z))[:, None]
    return Edit(torch.zeros_like(scaled), torch.ones_like(scaled[:, 0]), scaled)
