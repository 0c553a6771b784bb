"""How far an adapter's gates are open at each token of a text, and the text with each token shaded by it."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from peft import PeftModel
from rich.text import Text
from transformers import PreTrainedTokenizerBase


DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
NEWLINE = "↵"
"""Stands for a line end that is a token by itself, as ChatML's last prompt token is."""


def token_gates(
    model: PeftModel,
    input_ids: torch.Tensor,
    steering_mask: torch.Tensor,
    tokens: torch.Tensor,
    adapter_name: str | None = None,
    at: Literal["edited", "chosen"] = "edited",
) -> dict[int | str, torch.Tensor]:
    """An active adapter's gate values for some `tokens`, (seq,) bool, of one text.

    The adapter may be unnamed while just one is active. `input_ids` are (1, seq) int64, on the model's device;
    `steering_mask`, (1, seq), tells which are edited. `at`: "edited" for the gates at the token itself; "chosen" where
    the model chose it, at the token before (never the first).

    Returns:
        {layer: gate values summed over ranks, (tokens,) float32, 0 or more, on the CPU}, in model order.
    """
    where = tokens if at == "edited" else tokens.roll(-1)
    gates = model.gate_values(input_ids, adapter_name, steering_mask=steering_mask)
    return {layer: values[0, where.to(values.device)].sum(dim=-1).cpu() for layer, values in gates.items()}


def openness(gates: Mapping[int | str, torch.Tensor]) -> torch.Tensor:
    """How far gates are open at each token, (tokens,) between 0 and 1; 1 where they are widest.

    Gate values are divided by the layer's largest here and summed over layers, so that layers count alike whatever the
    size of their gates.
    """
    return relative(torch.stack([relative(values) for values in gates.values()]).sum(dim=0))


def relative(values: torch.Tensor) -> torch.Tensor:
    """Values as shares of the largest; 0 where all are."""
    return values / values.max().clamp(min=1e-9)


def shaded_answer(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompt: Mapping[str, torch.Tensor],
    answer_ids: torch.Tensor,
    adapter_name: str | None = None,
    digits: bool = False,
    encoding: str = "utf-8",
) -> Text:
    """The answer, (1, answer) int64, darker where the gates were open wider when the token was chosen.

    `prompt` is one conversation as `peft_psr.positions.encode_chat` gives it, on the model's device. The adapter may
    be left out while just one is active; `digits` and `encoding` as in `shade`.
    """
    ids = torch.cat([prompt["input_ids"], answer_ids], dim=1)
    mask = torch.cat([prompt["steering_mask"], torch.ones_like(answer_ids)], dim=1)
    answered = torch.arange(ids.shape[1], device=ids.device) >= prompt["input_ids"].shape[1]
    gates = token_gates(model, ids, mask, answered, adapter_name, at="chosen")
    return shade(token_texts(processing_class, answer_ids[0].tolist()), openness(gates).tolist(), digits, encoding)


def token_texts(processing_class: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; a token that ends inside a letter adds nothing yet."""
    texts: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        so_far = str(processing_class.decode(list(ids[:end]), skip_special_tokens=False))
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
    """Text for a terminal, each token, what it adds to the text, darker the stronger it is, 0-1.

    For output without colours `digits` puts a raised digit after each token, from 0 to 9 for the strongest; plain ones
    in brackets if the output's `encoding` has none raised. Without `NEWLINE` in it, there is an escape.
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
