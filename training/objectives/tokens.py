"""From one number a token to one number a triplet.

All losses average over the tokens of a triplet first, then over triplets, so that each triplet counts alike whatever
its length, as it does at the reported batch size of 1.
"""

import torch


def rows_of(mask: torch.Tensor) -> torch.Tensor:
    """The batch row of each masked token; (tokens,) int64."""
    return mask.bool().nonzero()[:, 0]


def row_means(values: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Mean of each row's values (tokens,), (batch,) float32 by each token's row (tokens,); 0 for a row without any."""
    rows = rows.to(values.device)
    counts = torch.bincount(rows, minlength=batch).clamp(min=1)
    return values.new_zeros(batch, dtype=torch.float32).index_add(0, rows, values.float()) / counts
