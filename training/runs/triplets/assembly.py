"""From a recipe to its parts: prompts, sampler, judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from peft_psr.files import check_file
from peft_psr.text import read_text
from peft_psr.training.data.draws import PromptPair, Sampler
from peft_psr.training.data.placement import check_placement
from peft_psr.training.judges.answer_cache import AnswerCache
from peft_psr.training.judges.base import Judge
from peft_psr.training.judges.grammar import GrammarJudge
from peft_psr.training.judges.language_model import ServerJudge
from peft_psr.training.judges.local import LocalJudge, number_tokens
from peft_psr.training.judges.prompts import COHERENCE_PROMPT, TRAIT_PROMPT
from peft_psr.training.runs.models import load_judge, load_judge_tokenizer, load_model, load_tokenizer
from peft_psr.training.sampling.chat_server import ChatServer
from peft_psr.training.sampling.local import LocalSampler
from peft_psr.training.sampling.server import ServerSampler
from peft_psr.training.sources.ifeval import IFEvalJudge
from peft_psr.training.sources.registry import SOURCES

from .recipe import DrawFields, Recipe


def prompt_pairs(recipe: Recipe) -> list[PromptPair]:
    """Returns the prompts of a recipe, in the order in which its results will stand.

    Raises:
        FileNotFoundError: the source's data are not there.
        ValueError: a file of it is malformed, an instruction in it is empty, a trait is unknown, or the source gave no
            prompts, or two of one id.
    """
    pairs = SOURCES[recipe.source].pairs(recipe.selection)
    if not pairs:
        raise ValueError(f"source: {recipe.source} gave no prompts.")
    ((name, count),) = Counter(pair.id for pair in pairs).most_common(1)
    if count > 1:
        raise ValueError(f"source: {recipe.source} gave {count} pairs the id {name!r}; each needs one of its own.")
    return pairs


def _server(url: str | None, model: str, key_variable: str, more: Mapping[str, Any], recipe: Recipe) -> ChatServer:
    return ChatServer(
        url or "",
        model,
        api_key_variable=key_variable,
        concurrency=recipe.concurrency,
        timeout=recipe.timeout,
        max_failure_share=recipe.max_failure_share,
        extra_body=more,
    )


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
        server = _server(recipe.server_url, recipe.model, recipe.server_key_variable, recipe.request_fields, recipe)
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

    Args:
        recipe: What to do.
        pairs: Its prompts.
        folder: The run's, for the cache of answers.

    Raises:
        FileNotFoundError: a prompt file is not there.
        ValueError: a prompt has no place for the answer.
    """
    if recipe.judge == "grammar":
        return GrammarJudge
    if recipe.model_judge == "local":  # whether it can judge shows before anything is drawn
        number_tokens(load_judge_tokenizer(recipe))
    if recipe.judge != "ifeval":
        return _language_model_maker(recipe, pairs, folder)
    make_coherence = _language_model_maker(recipe, pairs, folder) if recipe.coherence_judge else None
    IFEvalJudge(pairs)  # so does what has no checker

    @cache
    def judge() -> IFEvalJudge:
        return IFEvalJudge(pairs, make_coherence("") if make_coherence else None)

    return lambda trait: judge()


def _language_model_maker(recipe: Recipe, pairs: Sequence[PromptPair], folder: Path) -> Callable[[str], Judge]:
    trait_prompts, coherence_prompt = judge_prompts(recipe, pairs)
    judge_model = recipe.judge_model or ""

    if recipe.model_judge == "server":
        url = recipe.judge_url or recipe.server_url
        server = _server(url, judge_model, recipe.judge_key_variable, recipe.judge_fields, recipe)

    def make(trait: str) -> Judge:
        answers = AnswerCache(recipe.judge_cache or folder / "judge_answers.sqlite")
        settings: dict[str, Any] = {
            "trait": trait,
            # a judge of coherence alone asks that question twice, which counts as once
            "trait_prompt": trait_prompts.get(trait, TRAIT_PROMPT) if trait else coherence_prompt,
            "coherence_prompt": coherence_prompt,
            "cache": answers,
        }
        if recipe.model_judge == "server":
            return ServerJudge(server, **settings)
        return LocalJudge(
            load_judge(recipe), load_judge_tokenizer(recipe), **settings, batch_size=recipe.judge_batch_size
        )

    return make


def judge_prompts(recipe: Recipe, pairs: Sequence[PromptPair]) -> tuple[dict[str, str], str]:
    """Returns {trait: trait prompt}, as far as traits have their own, and the coherence prompt.

    Raises:
        FileNotFoundError: a prompt file of the recipe is not there.
        ValueError: such a file has no `{answer}` in it.
    """
    prompts = {name: _read_prompt(recipe, name) for name in ("trait_prompt", "coherence_prompt")}
    own = SOURCES[recipe.source].judge_prompts(recipe.selection)
    if prompts["trait_prompt"]:
        own = dict.fromkeys({pair.trait for pair in pairs}, prompts["trait_prompt"])
    return own, prompts["coherence_prompt"] or COHERENCE_PROMPT


def _read_prompt(recipe: Recipe, name: str) -> str | None:
    file = getattr(recipe, name)
    if file is None:
        return None
    check_file(file, name)
    text = read_text(file)
    if "{answer}" not in text:
        raise ValueError(f"{name}: {file} must hold {{answer}}, where the completion goes.")
    return text
