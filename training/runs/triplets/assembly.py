"""From a recipe to its parts: prompts, sampler, judges."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from peft_psr.base_model import loading
from peft_psr.files import check_file
from peft_psr.prompts.messages import Message
from peft_psr.text import read_text
from peft_psr.tiny_chat import TRAITS, instructions, prompt_messages, questions
from peft_psr.training.data.draws import Draw, Failure, PromptPair, Sampler
from peft_psr.training.data.placement import add_instruction, check_placement
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
from peft_psr.training.sources.axbench import axbench_pairs, read_axbench
from peft_psr.training.sources.ifeval import IFEvalJudge, read_ifeval
from peft_psr.training.sources.personas import Trait, list_traits, read_trait, trait_pairs

from .recipe import Recipe


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
    own = {trait.name: trait.eval_prompt for trait in _persona_traits(recipe)} if recipe.source == "personas" else {}
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
