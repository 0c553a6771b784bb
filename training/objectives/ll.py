"""The likelihood of the prompted model's answers.

    LL    mean cross-entropy of y' given x under the edited model                              METHOD 4, [P]

It knows of the prompted model's distribution the one token that was sampled; KL takes all of it.
"""

import torch
import torch.nn.functional as F

from .objective import Objective, Passes
from .prediction import Predict, in_pieces
from .tokens import row_means, rows_of


def likelihood_loss(
    predict: Predict, student: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Cross-entropy (nats) of the tokens of y', each predicted from the one before, (batch,); see `kl_loss`."""

    def losses(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(predict(hidden).float(), tokens, reduction="none")

    seen = (targets != -100).to(student.device)
    tokens = targets.to(student.device)[seen]
    values = in_pieces(losses, vocabulary, student[seen], tokens)
    return row_means(values, rows_of(mask).to(student.device)[seen], mask.shape[0])


class Likelihood(Objective):
    """The objective "ll"."""

    epochs = 7.0
    layers = "none"
    needs_logits = True

    def loss(self, passes: Passes) -> torch.Tensor:
        """Cross-entropy of the answers."""
        seen = passes.prediction
        return likelihood_loss(seen.head, seen.steered, seen.targets, passes.mask, seen.vocabulary)


LL = Likelihood()
