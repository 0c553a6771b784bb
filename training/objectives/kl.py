"""The prompted model's next-token distributions.

KL    mean over response tokens of KL(p(. | x' y'_<i) || p_edited(. | x y'_<i))            docs/results.md
"""

import torch
import torch.nn.functional as F

from .objective import Objective, Passes
from .prediction import Predict, in_pieces
from .tokens import row_means, rows_of


def kl_loss(
    predict: Predict,
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    vocabulary: int,
    predict_prompted: Predict,
) -> torch.Tensor:
    """KL(prompted || steered) of the next-token distributions, nats a response token: (batch,), each at least 0.

    `predict` is the model's head; `student` (tokens, d) is the output of the last decoder layer at the tokens of
    `mask`
    (batch, seq), `teacher` that of the prompted model, without graph; `targets` (tokens,), from `response_targets`,
    say
    which predict y'. The vocabulary's size decides how many are computed at once. `predict_prompted` is the head as it
    was,
    without what `modules_to_save` trains of it.
    """

    def divergences(hidden: torch.Tensor, prompted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = predict_prompted(prompted).float().log_softmax(dim=-1)
        got = predict(hidden).float().log_softmax(dim=-1)
        return F.kl_div(got, expected, reduction="none", log_target=True).sum(dim=-1)

    seen = (targets != -100).to(student.device)
    values = in_pieces(divergences, vocabulary, student[seen], teacher.to(student.device)[seen])
    return row_means(values, rows_of(mask).to(student.device)[seen], mask.shape[0])


class KullbackLeibler(Objective):
    """The objective "kl"."""

    layers = "last"
    needs_logits = True

    def loss(self, passes: Passes) -> torch.Tensor:
        """KL of the response tokens' distributions."""
        seen = passes.prediction
        assert seen.prompted is not None
        return kl_loss(
            seen.head, seen.steered, seen.prompted, seen.targets, passes.mask, seen.vocabulary, seen.prompted_head
        )


KL = KullbackLeibler()
