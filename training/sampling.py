"""Completions sampled from a model in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_psr.chat import Prompt, encode_prompt, pad_id
from peft_psr.positions import chat_mask, pad_rows


class Completion(NamedTuple):
    """Sampled text, and whether it was cut off at the token limit."""

    text: str
    truncated: bool


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel | PeftModel,
    processing_class,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    alpha: Sequence[float] | None = None,
    progress: str | None = None,
) -> list[Completion]:
    """One completion for each prompt, in the order of the prompts.

    Args:
        model: Any causal language model; a PSR adapter edits the positions of its own configuration.
        processing_class: Its tokenizer.
        prompts: Conversations or plain texts.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the sampling; 0 takes the likeliest token.
        batch_size: Prompts a batch; prompts of similar length go together.
        seed: The global random state is left as it was.
        alpha: One strength a prompt, for a model with a PSR adapter.
        progress: Title of a progress bar, or `None` for none.

    Raises:
        ValueError: `max_new_tokens` or `batch_size` below 1, or temperature below 0.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}.")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids = [encode_prompt(processing_class, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    results: list[Completion | None] = [None] * len(ids)
    # "response" needs no mask: `generate` knows the last prompt token
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    positions = getattr(config, "positions", None)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), tqdm(total=len(ids), desc=progress, disable=progress is None) as bar:
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = {
                    "input_ids": pad_rows([ids[i] for i in rows], pad_id(processing_class), device),
                    "attention_mask": pad_rows([[1] * len(ids[i]) for i in rows], 0, device),
                }
                if alpha is not None:
                    batch["alpha"] = torch.tensor([alpha[i] for i in rows], device=device)
                if positions == "question_and_response":
                    masks = [chat_mask(processing_class, prompts[i], positions) for i in rows]
                    batch["steering_mask"] = pad_rows(masks, 0, device)
                output = model.generate(  # type: ignore[operator]
                    **batch, **sampling, max_new_tokens=max_new_tokens, pad_token_id=pad_id(processing_class)
                )
                for i, row in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                    results[i] = _decode(processing_class, model, row)
                bar.update(len(rows))
    finally:
        model.train(was_training)
    return results  # type: ignore[return-value]


def _decode(processing_class, model: PreTrainedModel | PeftModel, ids: list[int]) -> Completion:
    """Text up to the first token that ends a turn; without one, the completion was cut off."""
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends]) | {processing_class.eos_token_id}
    length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return Completion(processing_class.decode(ids[:length], skip_special_tokens=True), length == len(ids))
