"""The prompted model's activations.

MSE   sum over layers of mean over (tokens x d) of (A_{l|AS} - A_{l|PS})^2                METHOD 4, [R]
"""

from collections.abc import Mapping

import torch

from .objective import Objective, Passes
from .tokens import row_means, rows_of


def mse_by_layer(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """{layer name: (batch,)}, the MSE of each layer and triplet; squares in float32.

    `student` and `teacher` are {layer name: (tokens, d)} at the tokens of `mask`, (batch, seq).
    """
    rows = rows_of(mask)
    return {
        name: row_means((hidden.float() - teacher[name].float()).square().mean(dim=-1), rows, mask.shape[0])
        for name, hidden in student.items()
    }


class MeanSquaredError(Objective):
    """The objective "mse"."""

    layers = "all"

    def loss(self, passes: Passes) -> dict[str, torch.Tensor]:
        """The MSE of each layer."""
        return mse_by_layer(passes.student.hidden, passes.teacher, passes.mask)


MSE = MeanSquaredError()
