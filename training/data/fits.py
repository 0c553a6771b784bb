"""Whether a completion can be trained on, as its tokens and the length of the model's context tell."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from .collator import TripletCollator
from .context import row_length
from .draws import PromptPair
from .filtering import TOO_LONG, UNFIT


class Fits:
    """Whether completions can be trained on, as far as a tokenizer and the length of the context tell.

    Args:
        processing_class: The tokenizer of the model that drew them.
        limit: Positions of that model, `None` for no limit.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase, limit: int | None) -> None:
        self.collator, self.limit = TripletCollator(processing_class, alpha=1.0), limit

    def reason(self, pair: PromptPair, drawn: Mapping[str, Any]) -> str | None:
        """Returns why training can't use a completion, `UNFIT` or `TOO_LONG`; None if it can, or if it is empty.

        Args:
            pair: What it was drawn on.
            drawn: `completion`, `truncated` and, where they are known, `completion_ids`.
        """
        if not drawn["completion"].strip():
            return None
        try:
            row = self.collator.encode({"prompt": pair.prompt, "steered_prompt": pair.steered_prompt, **drawn})
        except ValueError:
            return UNFIT
        return TOO_LONG if self.limit is not None and row_length(row) > self.limit else None
