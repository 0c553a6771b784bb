"""From a recipe to its parts: prompts, sampler, judges."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_psr.training.data.draws import PromptPair, Sampler
from peft_psr.training.data.placement import check_placement
from peft_psr.training.judges.base import Judge
from peft_psr.training.judges.prompts import COHERENCE_PROMPT, read_prompt
from peft_psr.training.judges.registry import JUDGES
from peft_psr.training.judges.settings import JudgeSettings
from peft_psr.training.runs.models import load_model, load_tokenizer
from peft_psr.training.sampling.chat_server import ChatServer
from peft_psr.training.sampling.local import LocalSampler
from peft_psr.training.sampling.server import ServerSampler
from peft_psr.training.sources.registry import SOURCES

from .recipe import DrawFields, Recipe


def prompt_pairs(recipe: Recipe) -> list[PromptPair]:
    """Returns the prompts of a recipe, in the order in which its results will stand.

    Raises as `Source.pairs`, and `ValueError` if the source gave no prompts, or two of one id.
    """
    pairs = SOURCES[recipe.source].pairs(recipe.selection)
    if not pairs:
        raise ValueError(f"source: {recipe.source} gave no prompts.")
    ((name, count),) = Counter(pair.id for pair in pairs).most_common(1)
    if count > 1:
        raise ValueError(f"source: {recipe.source} gave {count} pairs the id {name!r}; each needs one of its own.")
    return pairs


def check_template(recipe: DrawFields, tokenizer: Any) -> None:
    """Raises `ValueError` if the model takes no instruction where the recipe puts it."""
    if SOURCES[recipe.source].takes_instruction:
        check_placement(tokenizer, recipe.placement)


def make_sampler(recipe: Recipe) -> Sampler:
    """Returns the recipe's sampler, its model loaded if it is a local one.

    Raises:
        OSError: the model can't be had.
        ValueError: the model takes no instruction where the recipe puts it, or a server's setting is wrong.
    """
    if recipe.sampler == "server":
        server = ChatServer(
            recipe.server_url or "",
            recipe.model,
            api_key_variable=recipe.server_key_variable,
            concurrency=recipe.concurrency,
            timeout=recipe.timeout,
            max_failure_share=recipe.max_failure_share,
            extra_body=recipe.request_fields,
        )
        return ServerSampler(server, recipe.max_new_tokens, recipe.temperature)
    tokenizer = load_tokenizer(recipe.model, recipe)
    check_template(recipe, tokenizer)
    return LocalSampler(
        load_model(recipe.model, recipe),
        tokenizer,
        recipe.max_new_tokens,
        recipe.temperature,
        recipe.batch_size,
        name=recipe.model,
    )


def judge_maker(recipe: Recipe, pairs: Sequence[PromptPair], folder: Path) -> Callable[[str], Judge]:
    """Returns what makes each trait's judge; a model that judges is loaded once, when the first is made.

    Answers are cached in the run's `folder`. Raises as `judge_prompts` and `Judge.maker`.
    """
    own, coherence = judge_prompts(recipe, pairs)
    return JUDGES[recipe.judge].maker(
        replace(judge_settings(recipe, folder), pairs=pairs, trait_prompts=own, coherence_prompt=coherence)
    )


def judge_settings(recipe: DrawFields, folder: Path) -> JudgeSettings:
    """Returns what a recipe says of its judge, prompts aside; answers are cached in the run's `folder`."""
    return JudgeSettings(
        cache=Path(recipe.judge_cache or folder / "judge_answers.sqlite"),
        coherence_judge=recipe.coherence_judge,
        model=recipe.judge_model or "",
        revision=recipe.judge_revision,
        dtype=recipe.dtype,
        device_map=recipe.device_map,
        trust_remote_code=recipe.trust_remote_code,
        batch_size=recipe.judge_batch_size,
        url=recipe.judge_server or "",
        key_variable=recipe.judge_key_variable,
        fields=recipe.judge_fields,
        concurrency=recipe.concurrency,
        timeout=recipe.timeout,
        max_failure_share=recipe.max_failure_share,
    )


def judge_prompts(recipe: Recipe, pairs: Sequence[PromptPair]) -> tuple[dict[str, str], str]:
    """Returns {trait: trait prompt}, as far as traits have their own, and the coherence prompt, if a model judges.

    Raises as `read_prompt`.
    """
    if not recipe.model_judge:
        return {}, ""
    own = SOURCES[recipe.source].judge_prompts(recipe.selection)
    if recipe.trait_prompt:
        own = dict.fromkeys({pair.trait for pair in pairs}, read_prompt(recipe.trait_prompt, "trait_prompt"))
    coherence = recipe.coherence_prompt and read_prompt(recipe.coherence_prompt, "coherence_prompt")
    return own, coherence or COHERENCE_PROMPT
