"""What a model's positions hold: triplets and prompts that are longer than its context."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .collator import TripletCollator
from .draws import PromptPair
from .filtering import TOO_LONG, UNFIT


logger = logging.getLogger(__name__)


def context_length(config: Any) -> int | None:
    """How many positions a model has by its configuration, its rotary scaling counted in; `None` for no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if not isinstance(factor, int | float):
        return length
    return max(length, int(factor * (rope.get("original_max_position_embeddings") or length)))


def has_position_table(model: nn.Module) -> bool:
    """Whether positions are looked up in a table (GPT-2, OPT, GPT-J), which ends; rotary ones only get worse."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    names += [name for name, _ in model.named_buffers()]
    return any(name.rsplit(".", 1)[-1] in ("wpe", "embed_positions", "position_embeddings") for name in names)


def row_length(row: Mapping[str, Any]) -> int:
    """Tokens of the longer branch of an encoded triplet."""
    return max(len(row["input_ids"]), len(row["teacher_input_ids"]))


def too_long(length: int, limit: int) -> str:
    """What is wrong with a triplet, in words."""
    return f"{length} tokens, with its instruction, where the model has {limit} positions"


def check_rows(rows: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """Names encoded triplets that are longer than the model's context: a warning with rotary positions, which go on.

    Raises `ValueError` if the model looks its positions up in a table, which ends there.
    """
    limit = context_length(model.config)
    longer = [] if limit is None else [row for row in rows if row_length(row) > limit]
    if limit is None or not longer:
        return
    first = max(longer, key=row_length)
    what = f"{first['where']} has {too_long(row_length(first), limit)}"
    more = f", and {len(longer) - 1} more are too long" if len(longer) > 1 else ""
    if has_position_table(model):
        raise ValueError(f"{what}{more}. Leave it out, or shorten it.")
    logger.warning("%s%s: what it does there it was never trained for. Leave such triplets out.", what, more)


def check_room(
    lengths: Sequence[int], prompts: Sequence[Any], max_new_tokens: int, limit: int | None, ends: bool
) -> None:
    """Checks that `prompts`, of these `lengths` in tokens, and what is sampled on them fit into a model's context.

    With rotary positions an answer may run over the `limit`, which `generate` allows: that is a warning, as most
    answers
    end before. A table of positions `ends`.

    Raises:
        ValueError: a prompt leaves no room.
    """
    longest = max(range(len(lengths)), key=lambda i: lengths[i], default=None)
    if limit is None or longest is None or lengths[longest] + max_new_tokens <= limit:
        return
    length = lengths[longest]
    what = (
        f"max_new_tokens: a prompt of {length} tokens and {max_new_tokens} new ones do not fit into the model's "
        f"{limit} positions: {str(prompts[longest])[:200]!r}"
    )
    if length >= limit:
        raise ValueError(f"{what}. Shorten the prompt.")
    if ends:
        raise ValueError(f"{what}. Shorten the prompt, or set max_new_tokens to {limit - length}.")
    logger.warning("%s. Answers that run so long are no use.", what)


class Fits:
    """Whether completions can be trained on, as far as their model's tokenizer and its positions (`limit`) tell."""

    def __init__(self, processing_class: PreTrainedTokenizerBase, limit: int | None) -> None:
        self.collator, self.limit = TripletCollator(processing_class, alpha=1.0), limit

    def reason(self, pair: PromptPair, drawn: Mapping[str, Any]) -> str | None:
        """Returns why training can't use a completion, `UNFIT` or `TOO_LONG`; None if it can, or if it is empty.

        `drawn` holds `completion`, `truncated` and, where they are known, `completion_ids`.
        """
        if not drawn["completion"].strip():
            return None
        try:
            row = self.collator.encode({"prompt": pair.prompt, "steered_prompt": pair.steered_prompt, **drawn})
        except ValueError:
            return UNFIT
        return TOO_LONG if self.limit is not None and row_length(row) > self.limit else None
