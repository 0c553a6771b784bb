"""`generate` for a batch whose rows end at different times: what has ended is not carried on with.

transformers goes on with a whole batch until its last row ends. Here it is stopped every so many tokens, and goes on
from its cache with the rows that have not ended. What a row computes is the same, up to the rounding of sums in a
batch of another shape.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


STRETCH = 24
"""Tokens drawn between two looks at which rows have ended."""


def generate_rows(
    model: PreTrainedModel | PeftModel,
    inputs: dict[str, torch.Tensor],
    arguments: Callable[[Sequence[int]], dict[str, Any]],
    max_new_tokens: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """The tokens drawn for each row: up to one that ends it, what comes behind is padding.

    Args:
        model: Any causal language model.
        inputs: (batch, prompt) `input_ids` and `attention_mask`, padded on the left, and maybe a `steering_mask`.
        arguments: Returns the other arguments of `generate` for some of the rows, by their numbers.
        max_new_tokens: Longest completion.
        stops: Tokens that end a row; none if that can't be told from tokens alone.
    """
    rows = list(range(len(inputs["input_ids"])))
    prompt = inputs["input_ids"].shape[1]
    if not stops or max_new_tokens <= STRETCH or not can_be_interrupted(model):
        return model.generate(**inputs, **arguments(rows), max_new_tokens=max_new_tokens)[:, prompt:].tolist()  # type: ignore[operator]
    drawn: dict[int, list[int]] = {}
    left = max_new_tokens
    cache: dict[str, Any] = {}
    while True:
        output = model.generate(  # type: ignore[operator]
            **inputs, **arguments(rows), **cache, max_new_tokens=min(left, STRETCH), return_dict_in_generate=True
        )
        left -= STRETCH
        drawn |= zip(rows, output.sequences[:, prompt:].tolist(), strict=True)
        going = [i for i, row in enumerate(rows) if not set(stops).intersection(drawn[row])]
        if left <= 0 or not going:
            return [drawn[row] for row in sorted(drawn)]
        rows = [rows[i] for i in going]
        chosen = torch.tensor(going, device=output.sequences.device)
        output.past_key_values.batch_select_indices(chosen)
        cache = {"past_key_values": output.past_key_values}
        inputs = {name: _extended(tensor[chosen], output.sequences.shape[1]) for name, tensor in inputs.items()}
        inputs["input_ids"] = output.sequences[chosen]


def _extended(mask: torch.Tensor, length: int) -> torch.Tensor:
    """A 0/1 mask of the prompt with ones for what was drawn."""
    return torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], dim=1)


def can_be_interrupted(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a generation of the model can be stopped, and go on with some of its rows."""
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    settings = base.generation_config
    if settings.use_cache is False or settings.cache_implementation is not None or base.config.is_encoder_decoder:
        return False
    several_processes = torch.distributed.is_available() and torch.distributed.is_initialized()
    if base._is_stateful or several_processes:  # which have to call the model equally often
        return False
    layers = DynamicCache(config=base.config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
