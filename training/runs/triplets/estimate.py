"""What a run of `psr triplets` will ask for, before anything is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft_psr.prompts.conversations import Prompt, encode_prompt, turn_texts
from peft_psr.training.data.context import check_room, context_length
from peft_psr.training.data.draws import PromptPair
from peft_psr.training.judges.prompts import TRAIT_PROMPT
from peft_psr.training.runs.models import load_config, load_tokenizer

from .assembly import check_template, judge_prompts
from .recipe import Recipe


CHARACTERS_A_TOKEN = 4
"""Rule of thumb for English, for models whose tokenizer is on a server."""


@dataclass(frozen=True)
class Estimate:
    """What a run will ask for; completions and the judge's material are taken at their longest."""

    completions: int  # draws in all
    prompt_tokens: int  # of all draws' prompts
    most_completion_tokens: int  # of all completions
    judge_calls: int  # questions put to a judging model
    most_judge_tokens: int  # of those questions
    counted: bool  # whether prompt tokens were counted by the model's tokenizer; else by a rule of thumb


def estimate(recipe: Recipe, pairs: Sequence[PromptPair]) -> Estimate:
    """Returns what the recipe will ask for; loads a local model's tokenizer and configuration, and nothing else.

    Raises as `make_sampler`, and `ValueError` if a prompt leaves no room for answers.
    """
    completions = len(pairs) * recipe.draws
    most = completions * recipe.max_new_tokens
    if recipe.sampler == "local":
        tokenizer = load_tokenizer(recipe.model, recipe)
        check_template(recipe, tokenizer)
        lengths = [len(encode_prompt(tokenizer, pair.steered_prompt)) for pair in pairs]
        prompt_tokens = sum(lengths)
        config = load_config(recipe.model, recipe).get_text_config()
        ends = getattr(config, "rope_parameters", None) is None
        prompts = [pair.steered_prompt for pair in pairs]
        check_room(lengths, prompts, recipe.max_new_tokens, context_length(config), ends)
    else:
        prompt_tokens = sum(_length(pair.steered_prompt) for pair in pairs) // CHARACTERS_A_TOKEN
    calls, judge_tokens = 0, 0
    if recipe.model_judge:
        own, coherence = judge_prompts(recipe, pairs)
        questions = [
            [coherence] if recipe.coherence_judge else [coherence, own.get(p.trait, TRAIT_PROMPT)] for p in pairs
        ]
        calls = recipe.draws * sum(map(len, questions))
        asked = sum(
            len(text) + _length(pair.prompt) for pair, texts in zip(pairs, questions, strict=True) for text in texts
        )
        judge_tokens = recipe.draws * asked // CHARACTERS_A_TOKEN + calls * recipe.max_new_tokens
    return Estimate(completions, recipe.draws * prompt_tokens, most, calls, judge_tokens, recipe.sampler == "local")


def _length(prompt: Prompt) -> int:
    """Characters of a prompt."""
    return sum(map(len, turn_texts(prompt)))
