"""An answer with each token shaded by how far an adapter's gates were open where the token was chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from rich.text import Text


_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def gate_openness(
    model: PeftModel, prompt: Mapping[str, torch.Tensor], answer_ids: torch.Tensor, adapter_name: str | None = None
) -> torch.Tensor:
    """How open an active adapter's gates were at each token of an answer, 1 where they were widest.

    Gate values are summed over ranks, divided by the layer's largest in this answer and averaged over layers, so that
    layers count alike whatever the size of their gates.

    Args:
        model: A model with PSR adapters.
        prompt: One conversation as `peft_psr.positions.encode_chat` gives it, on the model's device.
        answer_ids: (1, answer) int64, at least one token.
        adapter_name: The adapter; may be left out while just one is active.

    Returns:
        (answer,) float32 between 0 and 1, on the CPU.
    """
    ids = torch.cat([prompt["input_ids"], answer_ids], dim=1)
    mask = torch.cat([prompt["steering_mask"], torch.ones_like(answer_ids)], dim=1)
    gates = model.gate_values(ids, adapter_name=adapter_name, steering_mask=mask)
    # the token at position i was chosen at position i - 1
    start = prompt["input_ids"].shape[1]
    by_layer = [values[0, start - 1 : -1].sum(dim=-1).cpu() for values in gates.values()]
    openness = torch.stack([values / values.max().clamp(min=1e-9) for values in by_layer]).mean(dim=0)
    return openness / openness.max().clamp(min=1e-9)


def shaded_answer(
    model: PeftModel,
    processing_class,
    prompt: Mapping[str, torch.Tensor],
    answer_ids: torch.Tensor,
    adapter_name: str | None = None,
    digits: bool = False,
) -> Text:
    """The answer, darker where the gates were open wider (see `gate_openness`, which takes the same arguments).

    Args:
        model: A model with PSR adapters.
        processing_class: Its tokenizer.
        prompt: One encoded conversation.
        answer_ids: (1, answer) int64.
        adapter_name: The adapter; may be left out while just one is active.
        digits: For output without colours: a raised digit after each token, from 0 (closed) to 9 (widest).
    """
    openness = gate_openness(model, prompt, answer_ids, adapter_name).tolist()
    text, before = Text(), ""
    for i, strength in enumerate(openness):
        # what a token adds to the text depends on those before it; one that ends inside a letter waits for the next
        so_far = processing_class.decode(answer_ids[0, : i + 1], skip_special_tokens=False)
        piece = so_far[len(before) :]
        if not piece or piece.endswith("\ufffd"):
            continue
        shade = 255 - int(175 * strength)
        text.append(piece, style=f"black on rgb(255,{shade},{shade})")
        if digits:
            text.append(_DIGITS[round(9 * strength)])
        before = so_far
    return text
