"""What the models predict: from their last layer's outputs by their own head, or as logits that came with the call."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

from peft_psr.base_model.decoder import text_config
from peft_psr.training.data.collator import Batch
from peft_psr.training.passes.branches import Branch, unedited
from peft_psr.training.passes.partial import predict


LOGITS_AT_ONCE = 2**25
"""Most logits (128 MB in float32) that are computed at once; more come in pieces, each computed again going back."""

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Logits (n, vocabulary) of outputs (n, d) of the last decoder layer."""


class Prediction(NamedTuple):
    """Both models' predictions at the masked tokens."""

    head: Predict  # logits (n, vocabulary) of some rows of `steered`
    # (tokens, d), outputs of the last decoder layer, or logits (tokens, vocabulary), which `head` returns
    steered: torch.Tensor
    prompted_head: Predict  # likewise of `prompted`: the head as it was, without what `modules_to_save` trains of it
    prompted: torch.Tensor | None  # likewise of the prompted model; `None` where nothing looks at it
    targets: torch.Tensor  # (tokens,), from `response_targets`
    vocabulary: int  # its size


def prediction_of(
    model: PeftModel, batch: Batch, student: Branch, last: str, prompted: torch.Tensor | None
) -> Prediction:
    """The predictions of a batch at its masked tokens.

    The steered model's are its pass's logits, if it has them, else its head on the `last` decoder layer's output;
    `prompted` is the same of the prompted model.
    """
    mask = batch["steering_mask"]
    vocabulary = text_config(model.get_base_model()).vocab_size
    targets = response_targets(batch["labels"], mask)
    if student.logits is not None:
        return Prediction(_itself, student.logits[mask.bool()], _itself, prompted, targets, vocabulary)
    head = partial(predict, model, layers_pattern=model.active_peft_config.layers_pattern)
    as_it_was = partial(_predict_unedited, model, head)
    return Prediction(head, student.hidden[last], as_it_was, prompted, targets, vocabulary)


def response_targets(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What each masked token has to predict, (tokens,) int64: the next token of y', or -100 where there is none.

    The first such prediction, of y'_1, is made at the last prompt token: the first one an edit can reach. `labels`
    (batch, seq) are -100 outside y', `mask` (batch, seq) is of the masked tokens.
    """
    return F.pad(labels[:, 1:], (0, 1), value=-100)[mask.bool()]


def in_pieces(function: Callable[..., torch.Tensor], vocabulary: int, *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of equal slices of the tensors, put together, where all at once would be too many logits."""
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(tensors[0]) <= size:
        return function(*tensors)
    pieces = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


def _itself(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _predict_unedited(model: PeftModel, head: Predict, hidden: torch.Tensor) -> torch.Tensor:
    with unedited(model):
        return head(hidden)
