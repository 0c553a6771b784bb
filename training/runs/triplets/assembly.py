"""From a recipe to its parts: prompts, sampler, judges."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_psr.base_model import loading
from peft_psr.prompts.messages import Message
from peft_psr.tiny_chat import TRAITS, instructions, prompt_messages, questions
from peft_psr.training.data.draws import Draw, Failure, PromptPair, Sampler
from peft_psr.training.data.placement import add_instruction, check_placement
from peft_psr.training.judges.base import Judge
from peft_psr.training.judges.prompts import COHERENCE_PROMPT, read_prompt
from peft_psr.training.judges.registry import JUDGES
from peft_psr.training.judges.settings import JudgeSettings
from peft_psr.training.runs.models import load_model, load_tokenizer
from peft_psr.training.sampling.chat_server import ChatServer
from peft_psr.training.sampling.local import LocalSampler
from peft_psr.training.sampling.server import ServerSampler
from peft_psr.training.sources.axbench import axbench_pairs, read_axbench
from peft_psr.training.sources.ifeval import read_ifeval
from peft_psr.training.sources.personas import Trait, list_traits, read_trait, trait_pairs

from .recipe import DrawFields, Recipe


logger = logging.getLogger(__name__)


def prompt_pairs(recipe: Recipe) -> list[PromptPair]:
    """Returns the prompts of a recipe, in the order in which its results will stand.

    Raises:
        FileNotFoundError: the source's data are not there.
        ValueError: a file of it is malformed, an instruction in it is empty, or a trait is unknown.
    """
    return _SOURCES[recipe.source](recipe)


def _embedded_pairs(recipe: Recipe) -> list[PromptPair]:
    names = _chosen(recipe, list(TRAITS))
    asked = [question.text for question in questions(recipe.split)][: recipe.questions]
    return [
        PromptPair(
            id=f"{name}/{i}/{q}",
            trait=name,
            prompt=prompt_messages(question),
            steered_prompt=add_instruction(prompt_messages(question), instruction, recipe.placement),
        )
        for name in names
        for i, instruction in enumerate(instructions(name, recipe.split)[: recipe.instructions])
        for q, question in enumerate(asked)
    ]


def _persona_traits(recipe: Recipe) -> list[Trait]:
    known = list_traits(recipe.data, recipe.data_revision)
    read = (
        read_trait(name if recipe.data is None else recipe.data, recipe.split, name, recipe.data_revision)
        for name in _chosen(recipe, known)
    )
    return [
        replace(
            trait,
            instructions=trait.instructions[: recipe.instructions],
            questions=trait.questions[: recipe.questions],
        )
        for trait in read
    ]


def _persona_pairs(recipe: Recipe) -> list[PromptPair]:
    return [
        pair
        for trait in _persona_traits(recipe)
        for negative in ([False, True] if recipe.negatives else [False])
        for pair in trait_pairs(trait, recipe.placement, negative)
    ]


def _ifeval_pairs(recipe: Recipe) -> list[PromptPair]:
    seen: Counter[str] = Counter()
    pairs = []
    for pair in read_ifeval(recipe.data or "", recipe.traits or None):
        if pair.prompt == pair.steered_prompt:  # the published files have a few
            logger.warning("%s is left out: its prompt is the same without the instruction.", pair.id)
            continue
        seen[pair.trait] += 1
        if recipe.questions is None or seen[pair.trait] <= recipe.questions:
            pairs.append(pair)
    return pairs


def _axbench_pairs(recipe: Recipe) -> list[PromptPair]:
    for name in recipe.traits:
        if not name.isdecimal():
            raise ValueError(f"traits: AxBench's concepts are known by their number, got {name!r}.")
    concepts = read_axbench(recipe.data or "", [int(name) for name in recipe.traits] or None)
    return [pair for concept in concepts for pair in axbench_pairs(concept, recipe.placement)[: recipe.questions]]


_SOURCES = {
    "embedded": _embedded_pairs,
    "personas": _persona_pairs,
    "ifeval": _ifeval_pairs,
    "axbench": _axbench_pairs,
}


def _chosen(recipe: Recipe, known: Sequence[str]) -> list[str]:
    unknown = [name for name in recipe.traits if name not in known]
    if unknown:
        where = recipe.data or f"source: {recipe.source}"
        raise ValueError(f"traits: {where} has no {', '.join(map(repr, unknown))}; there are: {', '.join(known)}.")
    return list(recipe.traits or known)


def check_template(recipe: Recipe, tokenizer: Any) -> None:
    """Raises `ValueError` if the model takes no instruction where the recipe puts it."""
    if recipe.source != "ifeval":  # its prompts hold their instructions
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

    Args:
        recipe: What to do.
        pairs: Its prompts.
        folder: The run's, for the cache of answers.

    Raises:
        FileNotFoundError: a prompt file is not there.
        ValueError: a prompt has no place for the answer, or the judge can't score these prompts.
    """
    own, coherence = judge_prompts(recipe, pairs)
    return JUDGES[recipe.judge].maker(replace(judge_settings(recipe, folder), pairs=pairs, trait_prompts=own,
                                              coherence_prompt=coherence))  # fmt: skip


def judge_settings(recipe: DrawFields, folder: Path) -> JudgeSettings:
    """Returns what a recipe says of its judge, prompts aside.

    Args:
        recipe: What to do.
        folder: The run's, for the cache of answers.
    """
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

    Raises:
        FileNotFoundError: a prompt file of the recipe is not there.
        ValueError: such a file has no `{answer}` in it.
    """
    if not recipe.model_judge:
        return {}, ""
    own = {trait.name: trait.eval_prompt for trait in _persona_traits(recipe)} if recipe.source == "personas" else {}
    if recipe.trait_prompt:
        own = dict.fromkeys({pair.trait for pair in pairs}, read_prompt(recipe.trait_prompt, "trait_prompt"))
    coherence = recipe.coherence_prompt and read_prompt(recipe.coherence_prompt, "coherence_prompt")
    return own, coherence or COHERENCE_PROMPT


def make_chat(
    model: str, server_url: str | None, key_variable: str, max_new_tokens: int, temperature: float, seed: int
) -> Callable[[Sequence[Message]], str]:
    """Returns what answers a conversation with text: a model here, or on a server if a URL is given.

    Args:
        model: Hub name or folder, 'embedded', or its name on the server.
        server_url: Such as http://localhost:8000/v1.
        key_variable: Environment variable with the server's key.
        max_new_tokens: Longest answer, in tokens.
        temperature: Of the sampling.
        seed: Of the sampling.

    Raises:
        ConnectionError: (by what is returned) the server gave no answer.
        OSError: the model can't be had.
        ValueError: a setting is wrong.
    """
    sampler: Sampler
    if server_url:
        sampler = ServerSampler(ChatServer(server_url, model, key_variable), max_new_tokens, temperature)
    else:
        loaded = loading.load_model(model, device_map="auto")
        sampler = LocalSampler(loaded, loading.load_tokenizer(model), max_new_tokens, temperature)

    def chat(messages: Sequence[Message]) -> str:
        ((_, outcome),) = sampler([Draw("chat", messages, seed)])
        if isinstance(outcome, Failure):
            raise ConnectionError(f"{model} gave no answer: {outcome.reason}")
        if outcome.answer is None:
            raise ConnectionError(
                f"{model} did not come to an answer: its reasoning took all {max_new_tokens} tokens."
            )
        return outcome.answer

    return chat
