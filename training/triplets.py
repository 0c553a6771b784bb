"""Triplets (x, x', y'): a plain prompt, the same with a trait-eliciting instruction, a completion of the latter.

One JSON object a line, in TRL's conversational format with two more fields for the scores; see `Triplet`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from peft import PeftModel
from transformers import PreTrainedModel

from peft_psr.chat import Prompt
from peft_psr.files import write_whole
from peft_psr.judging import Judge, Message, judge_answers

from .placement import add_instruction
from .sampling import Completion, sample_completions


class _Required(TypedDict):
    prompt: Prompt
    steered_prompt: Prompt
    completion: str


class Triplet(_Required, total=False):
    """One training example.

    Attributes:
        prompt: x, messages up to the assistant's turn (or plain text for a model without a chat template).
        steered_prompt: x', the same with the instruction.
        completion: y', sampled on x'.
        trait_score: How strongly y' shows the trait, 0-100, or `None` if the judge could not tell.
        coherence_score: How coherent y' is as an answer to x, 0-100, or `None`.
        truncated: y' was cut off at the token limit, so no end of turn follows it.
        completion_ids: The tokens of y' as they were drawn, with the one that ends the turn; without them the text is
            tokenised.
        reasoning_opened: x' ends inside reasoning, which y' goes on with; it is judged by what follows.
    """

    trait_score: float | None
    coherence_score: float | None
    truncated: bool
    completion_ids: list[int]
    reasoning_opened: bool


def generate_triplets(
    model: PreTrainedModel | PeftModel,
    processing_class,
    instructions: Sequence[str],
    prompts: Sequence[Sequence[Message]],
    judge: Judge,
    num_draws: int = 10,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> list[Triplet]:
    """Sample and judge completions for every instruction x prompt x draw; nothing is filtered.

    The judge sees the bare prompt, as METHOD asks, so that prompted and steered models are judged alike.

    Args:
        model: Any causal language model; its adapters, if it has any, stay on.
        processing_class: Its tokenizer.
        instructions: System texts that elicit the trait.
        prompts: Conversations without the instruction.
        judge: Scores the completions.
        num_draws: Completions for each pair of instruction and prompt.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the sampling.
        batch_size: Completions sampled together.
        seed: Same seed, same machine: same triplets, in any batch size.
        progress: Show a progress bar.

    Raises:
        ValueError: no instructions, no prompts, or `num_draws` below 1.
    """
    for name, value in {"instructions": instructions, "prompts": prompts}.items():
        if len(value) == 0:
            raise ValueError(f"generate_triplets needs at least one of its `{name}`, got none.")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    pairs = [(list(p), add_instruction(p, i)) for i in instructions for p in prompts for _ in range(num_draws)]
    samples = sample_completions(
        model,
        processing_class,
        [steered for _, steered in pairs],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        progress="sampling triplets" if progress else None,
    )
    scores = judge_answers(judge, [prompt for prompt, _ in pairs], [sample.answer for sample in samples])
    return [
        Triplet(
            prompt=prompt,
            steered_prompt=steered,
            completion=sample.text,
            trait_score=score.trait,
            coherence_score=score.coherence,
            truncated=sample.truncated,
            **drawn_tokens(sample),
        )
        for (prompt, steered), sample, score in zip(pairs, samples, scores, strict=True)
    ]


def drawn_tokens(sample: Completion) -> dict[str, Any]:
    """What a triplet holds of a completion besides its text."""
    known: dict[str, Any] = {} if sample.ids is None else {"completion_ids": list(sample.ids)}
    return known | {"reasoning_opened": True} if sample.opened else known


def write_triplets(triplets: Iterable[Triplet], path: str | os.PathLike) -> None:
    """Write triplets as JSONL; the file is whole or as it was before."""
    write_whole(path, "".join(json.dumps(triplet, ensure_ascii=False) + "\n" for triplet in triplets))


def read_triplets(path: str | os.PathLike) -> list[Triplet]:
    """Read triplets from JSONL.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, or a line is no JSON object with `prompt`, `steered_prompt` and `completion`;
            the message names the line.
    """
    triplets: list[Triplet] = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                triplet = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            check_triplet(triplet, f"{path}, line {number}")
            triplets.append(triplet)
    if not triplets:
        raise ValueError(f"{path} holds no triplets. Write some with `generate_triplets` and `write_triplets`.")
    return triplets


def check_triplet(triplet: object, where: str) -> None:
    """Raise `ValueError`, naming `where`, unless `triplet` has all that training needs."""
    if not isinstance(triplet, dict):
        raise ValueError(f"{where}: a triplet is an object, got {type(triplet).__name__}.")
    missing = [name for name in ("prompt", "steered_prompt", "completion") if not triplet.get(name)]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing or empty; a triplet has prompt, steered_prompt and "
                         "completion.")  # fmt: skip
    if not isinstance(triplet["completion"], str):
        raise ValueError(f"{where}: completion must be text, got {triplet['completion']!r}.")
    for name in ("prompt", "steered_prompt"):
        messages = triplet[name]
        if not isinstance(messages, str) and not (
            isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages)
        ):
            raise ValueError(f"{where}: {name} must be text or messages with role and content, got {messages!r}.")
    for name in ("trait_score", "coherence_score"):
        score = triplet.get(name)
        if score is not None and not (isinstance(score, int | float) and 0 <= score <= 100):
            raise ValueError(f"{where}: {name} must be 0-100 or null, got {score!r}.")
