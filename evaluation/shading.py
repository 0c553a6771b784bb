"""Text with each token shaded: an answer by how far an adapter's gates were open where the token was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from rich.text import Text


DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
NEWLINE = "↵"
"""Stands for a line end that is a token by itself, as ChatML's last prompt token is."""


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
    encoding: str = "utf-8",
) -> Text:
    """The answer, darker where the gates were open wider (see `gate_openness`, which takes the same arguments).

    Args:
        model: A model with PSR adapters.
        processing_class: Its tokenizer.
        prompt: One encoded conversation.
        answer_ids: (1, answer) int64.
        adapter_name: The adapter; may be left out while just one is active.
        digits: As in `shade`.
        encoding: As in `shade`.
    """
    openness = gate_openness(model, prompt, answer_ids, adapter_name).tolist()
    return shade(token_texts(processing_class, answer_ids[0].tolist()), openness, digits, encoding)


def token_texts(processing_class, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; a token that ends inside a letter adds nothing yet."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        so_far = processing_class.decode(ids[:end], skip_special_tokens=False)
        whole = end == len(ids) or not so_far.endswith("\ufffd")
        texts.append(so_far[len(before) :] if whole else "")
        before = so_far if whole else before
    return texts


def visible(text: str) -> tuple[str, str]:
    """What of a token is to be shaded, line ends alone as `NEWLINE`, and the line ends after it."""
    shown = text.rstrip("\n")
    ends = text[len(shown) :]
    return (shown if shown.strip() else shown + NEWLINE * len(ends)), ends


def shade(texts: Sequence[str], strengths: Sequence[float], digits: bool = False, encoding: str = "utf-8") -> Text:
    """Text for a terminal, each token darker the stronger it is.

    Args:
        texts: What each token adds to the text.
        strengths: One each, 0-1.
        digits: For output without colours: a raised digit after each token, from 0 to 9 for the strongest.
        encoding: The output's. Without raised digits in it, plain ones in brackets; without `NEWLINE`, an escape.
    """
    raised = list(DIGITS) if _has(encoding, DIGITS) else [f"[{digit}]" for digit in range(10)]
    newline = NEWLINE if _has(encoding, NEWLINE) else "\\n"
    text = Text()
    for piece, strength in zip(texts, strengths, strict=True):
        level = 255 - int(175 * strength)
        shown, ends = visible(piece)
        text.append(shown.replace(NEWLINE, newline), style=f"black on rgb(255,{level},{level})")
        if digits and shown:
            text.append(raised[round(9 * strength)])
        text.append(ends)
    return text


def _has(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
