"""The residual stream at the last token of prompts with and without the instruction, for methods that start there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.base_model.decoder import capture_layer_outputs, decoder_layer_names
from peft_psr.positions import last_token_mask, pad_tokens
from peft_psr.prompts.conversations import Prompt, encode_prompt
from peft_psr.training.data.triplets import Triplet, check_triplet


class Contrast(NamedTuple):
    """One prompt twice: x and x'."""

    plain: Prompt
    prompted: Prompt


def contrast_pairs(triplets: Sequence[Triplet], processing_class: PreTrainedTokenizerBase) -> list[Contrast]:
    """The pairs of prompts that differ in triplets, in order, each once; `ValueError` if there is none."""
    pairs: dict[tuple[tuple[int, ...], ...], Contrast] = {}
    for index, triplet in enumerate(triplets):
        check_triplet(triplet, f"triplets[{index}]")
        plain, prompted = (
            tuple(encode_prompt(processing_class, triplet[name])) for name in ("prompt", "steered_prompt")
        )
        if plain != prompted:
            pairs.setdefault((plain, prompted), Contrast(triplet["prompt"], triplet["steered_prompt"]))
    if not pairs:
        raise ValueError(
            f"None of {len(triplets)} triplets has an instruction in its `steered_prompt`, so there is nothing to "
            "compare. Give triplets whose `steered_prompt` is the `prompt` with the instruction."
        )
    return list(pairs.values())


@torch.no_grad()
def last_token_stream(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    layer: int,
    batch_size: int,
    on_batch: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Output of a decoder layer, from 0, at the last token of each prompt: (prompts, d) float32, on the CPU.

    The base model is left in eval mode; `on_batch` is called after each forward pass of `batch_size` prompts.
    `ValueError` if there is no such layer, or activations are not finite.
    """
    names = decoder_layer_names(model)
    if not 0 <= layer < len(names):
        raise ValueError(f"layer={layer}, but the model has {len(names)} decoder layers: 0 to {len(names) - 1}.")
    name = names[layer]
    model.eval()
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(prompts), batch_size):
        ids = [encode_prompt(processing_class, prompt) for prompt in prompts[start : start + batch_size]]
        batch = pad_tokens(processing_class, ids, device, side="right")
        with capture_layer_outputs(model, [name]) as outputs:
            model.base_model(**batch, use_cache=False)  # without its head
        hidden = outputs[name]
        found.append(hidden[last_token_mask(batch["attention_mask"]).to(hidden.device)].float().cpu())
        finite = found[-1].isfinite().all(dim=1)
        if not finite.all():
            prompt = prompts[start + int((~finite).nonzero()[0])]
            raise ValueError(
                f"Activations are not finite at {name!r} on the prompt {prompt!r}. Load the model in bfloat16 or "
                "float32 if it is in float16, which ends at 65,504; else leave that prompt out."
            )
        if on_batch is not None:
            on_batch()
    return torch.cat(found)
