"""Triplets to measure on: the model's own prompted answers to a source's test questions; nobody judges them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from peft_psr.training import PromptPair, Triplet, sample_completions
from peft_psr.training.data.context import Fits, context_length
from peft_psr.training.data.draws import drawn_triplet

from .recipe import EvaluateRecipe


def draw_held_out(
    model: PreTrainedModel, processing_class: Any, recipe: EvaluateRecipe, pairs: Sequence[PromptPair]
) -> list[Triplet]:
    """The recipe's number of answers to each prompt of a trait, without those that can't be measured on."""
    asked = [pair for pair in pairs for _ in range(recipe.held_out_draws)]
    completions = sample_completions(
        model,
        processing_class,
        [pair.steered_prompt for pair in asked],
        recipe.max_new_tokens,
        recipe.temperature,
        recipe.batch_size,
        recipe.seed + 1,
    )
    fits = Fits(processing_class, context_length(model.config))
    drawn = [
        (pair, drawn_triplet(pair.prompt, pair.steered_prompt, completion))
        for pair, completion in zip(asked, completions, strict=True)
        if completion.text.strip()
    ]
    return [triplet for pair, triplet in drawn if not fits.reason(pair, triplet)]
