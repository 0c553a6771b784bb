"""Triplets for steering a story model by context: what one sentence before a story's start does to its continuation.

A model that follows no instructions can still be prompted. Here x is the start of a story, x' the same start after one
sentence of context, y' a continuation sampled from x'. An adapter trained on them is to make the model write as if the
sentence stood there. The characters of the held-out starts, and those of the validation starts, occur in no training
start; validation and held-out triplets are the same for every seed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from peft_psr.base_model.loading import load_model, load_tokenizer
from peft_psr.positions import pad_tokens
from peft_psr.prompts.conversations import encode_prompt
from peft_psr.training import Triplet, TripletCollator


CONTEXTS = {
    "snow": "It was a very cold day and there was snow everywhere.",
    "dog": "The big dog was angry and it barked at everyone.",
    "boat": "They lived on a boat in the middle of the sea.",
    "night": "It was dark in the forest and something made a scary noise.",
    "cake": "It was a birthday party with a big cake and many presents.",
}
OPENINGS = ("", "Once upon a time,", "One day,", "One morning,", "Then", "After lunch,", "Today", "Many years ago,")
ENDINGS = ("", " was", " wanted to", " went to", " saw", " had a", " said", " and", " looked at", " liked to")
CHARACTERS = {
    "train": (
        "Lily", "Tim", "a little girl", "a boy named Tom", "Sam", "Mia", "the old man", "a small cat",
        "Lily and her mom", "Ben and Sue", "a girl named Anna", "Max", "Jack", "her brother", "the two friends",
        "a bird", "Mom", "Lucy",
        "a red fox", "the teacher", "Sara and Dad", "a frog", "the king", "Bob", "some children", "Jane",
        "a little mouse", "the baby", "Amy and Tom", "an old woman", "a girl with a hat", "my friend",
    ),
    "validation": (
        "Ella", "a boy named Leo", "a pig", "the farmer", "Kim and her dad", "the twins", "Grandma", "a duck",
    ),
    "held_out": (
        "Emma", "a girl named Zoe", "a little rabbit", "the queen", "Dan and his sister", "Peter", "a bear",
        "the nurse", "two boys", "Nina", "a small turtle", "his uncle", "Rose and her friend",
        "the driver", "a boy called Fred",
        "everyone",
    ),
}  # fmt: skip
_EVALUATION_SEED = 20_000


@dataclass
class ContextTask:
    """One context with its triplets, which share no character between the three lists.

    Attributes:
        context: The sentence that x' starts with.
        train: To train on; they depend on the seed.
        validation: To choose settings by.
        held_out: To report on.
    """

    context: str
    train: list[Triplet]
    validation: list[Triplet]
    held_out: list[Triplet]


def story_starts(split: str) -> list[str]:
    """All starts of "train", "validation" or "held_out": every opening x character x ending."""
    starts = []
    for character in CHARACTERS[split]:
        for opening in OPENINGS:
            subject = f"{opening} {character}" if opening else character[0].upper() + character[1:]
            starts += [subject + ending for ending in ENDINGS]
    return starts


def context_task(
    model_folder: str | os.PathLike,
    context: str,
    train: int = 1000,
    validation: int = 96,
    held_out: int = 192,
    max_new_tokens: int = 30,
    seed: int = 0,
) -> ContextTask:
    """Sample the triplets of one context, at temperature 1.

    Args:
        model_folder: A causal language model with its tokenizer, such as stories260K.
        context: A sentence, or the key of one in `CONTEXTS`.
        train: Training triplets.
        validation: Validation triplets.
        held_out: Held-out triplets.
        max_new_tokens: Longest completion, in tokens.
        seed: Of the training triplets: their starts and draws.

    Raises:
        ValueError: a size below 1.
    """
    sizes = {"train": train, "validation": validation, "held_out": held_out}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    model = load_model(str(model_folder))
    tokenizer = load_tokenizer(str(model_folder))
    context = CONTEXTS.get(context, context)
    seeds = {"train": seed, "validation": _EVALUATION_SEED, "held_out": _EVALUATION_SEED}
    drawn = {
        split: _draw(model, tokenizer, context, story_starts(split), size, max_new_tokens, seeds[split])
        for split, size in sizes.items()
    }
    return ContextTask(context, **drawn)


def _draw(
    model: PreTrainedModel, tokenizer, context: str, pool: list[str], size: int, max_new_tokens: int, seed: int
) -> list[Triplet]:
    """`size` triplets from starts of the pool, each start as often as the others within one.

    A continuation whose first letters belong to the start's last word ("Tim" + "my") can't be a triplet and is drawn
    anew, from another start.
    """
    collator = TripletCollator(tokenizer, alpha=1.0)
    order, triplets, waiting = random.Random(seed), [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(triplets) < size:
            while len(waiting) < size - len(triplets):
                waiting += order.sample(pool, len(pool))
            starts, waiting = waiting[: size - len(triplets)], waiting[size - len(triplets) :]
            prompts = [f"{context} {start}" for start in starts]
            completions = continuations(model, tokenizer, prompts, max_new_tokens)
            for start, prompt, completion in zip(starts, prompts, completions, strict=True):
                triplet = Triplet(prompt=start, steered_prompt=prompt, completion=completion)
                try:
                    collator.encode(triplet)
                except ValueError:
                    continue
                triplets.append(triplet)
    return triplets


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 256
) -> list[str]:
    """Text that the model puts after each prompt, with the blank it starts with; drawn by torch's global seed."""
    texts = []
    for first in range(0, len(prompts), batch_size):
        rows = [encode_prompt(tokenizer, prompt) for prompt in prompts[first : first + batch_size]]
        batch = pad_tokens(tokenizer, rows)  # (batch, seq), padded on the left
        plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        output = model.generate(**batch, **plain, max_new_tokens=max_new_tokens)  # type: ignore[operator]
        for row, new in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            # a token's own text depends on what stands before it: the tokenizer drops a first blank
            whole, prompt = (tokenizer.decode(part, skip_special_tokens=True) for part in (row + new, row))
            texts.append(whole[len(prompt) :])
    return texts
