"""Completions sampled from a local model: in batches of similar length, each row by its own seed, on any device."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.positions import chat_mask, pad_rows, pad_tokens
from peft_psr.prompts.chat_template import template_args_of
from peft_psr.prompts.conversations import (
    Prompt,
    begins_answer,
    decode_completion,
    encode_prompt,
    pad_id,
    render_prompt,
)
from peft_psr.prompts.messages import content_text
from peft_psr.prompts.reasoning import opens_reasoning, split_reasoning
from peft_psr.training.data.context import check_room, context_length, has_position_table
from peft_psr.training.data.draws import Completion, Draw, Failure, check_sampling, draw_seed, template_hash
from peft_psr.training.passes.partial import attribute, in_eval_mode, input_device
from peft_psr.training.progress import Progress

from .generating import generate_rows
from .gumbel import GumbelLogitsProcessor


logger = logging.getLogger(__name__)


KEPT_SETTINGS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "stop_strings",
    "use_cache",
    "cache_implementation",
    "cache_config",
)
"""Of a model's generation settings, those that say where an answer ends and how it is computed."""


@dataclass(frozen=True)
class _Row:
    index: int
    prompt: Prompt
    ids: list[int]
    seed: int
    alpha: float | None = None
    adapter: str | None = None


def sample_completions(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    alpha: Sequence[float] | None = None,
    progress: str | None = None,
    adapter_names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """One completion for each prompt, in the order of the prompts.

    A prompt's completion depends on `seed` and its place in `prompts`, or on its own of `seeds`, not on what shares
    its batch (see `LocalSampler` for the limits of that).

    Args:
        model: Any causal language model; a PSR adapter edits the positions of its own configuration.
        processing_class: Its tokenizer.
        prompts: Conversations or plain texts.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the sampling; 0 takes the likeliest token.
        batch_size: Most prompts a batch; prompts of similar length go together. Halved when memory runs out.
        seed: The global random state is neither used nor changed.
        alpha: One strength a prompt, for a model with a PSR adapter.
        progress: Title of a progress bar, or `None` for none.
        adapter_names: One PSR adapter a prompt in place of the active one, "__base__" for none; all of them edit the
            positions that the active one does.
        seeds: One seed a prompt, from 0 below 2^31, in place of `seed`.

    Raises:
        ValueError: `max_new_tokens` or `batch_size` below 1, or temperature below 0; or not as many strengths, names
            or seeds as prompts.
        torch.OutOfMemoryError: a single prompt does not fit.
    """
    check_sampling(max_new_tokens, temperature, batch_size)
    for name, each in {"alpha": alpha, "adapter_names": adapter_names, "seeds": seeds}.items():
        if each is not None and len(each) != len(prompts):
            raise ValueError(f"{name} must hold one for each of the {len(prompts)} prompts, got {len(each)}.")
    rows = [
        _Row(
            i,
            prompt,
            encode_prompt(processing_class, prompt),
            draw_seed(seed, f"prompt/{i}") if seeds is None else seeds[i],
            None if alpha is None else alpha[i],
            None if adapter_names is None else adapter_names[i],
        )
        for i, prompt in enumerate(prompts)
    ]
    results: list[Completion | None] = [None] * len(rows)
    with Progress(progress or "sampling", len(rows), shown=progress is not None) as bar:
        for row, completion in _sample(model, processing_class, rows, max_new_tokens, temperature, batch_size):
            results[row.index] = completion
            bar.advance()
    return results  # type: ignore[return-value]


class LocalSampler:
    """Makes draws with a transformers model; a `peft_psr.training.data.draws.Sampler`.

    Each draw samples from softmax(logits / temperature) by its own seed, so its text does not depend on the batch. In
    low precision, and where two tokens are all but equally likely, the sums inside a batch of another shape can round
    otherwise and another token win; so can another device or version of torch. The model's own generation settings
    (top-p, penalties) are not applied, its end tokens are.

    Args:
        model, processing_class, max_new_tokens, temperature, batch_size: As in `sample_completions`, errors too; the
        model
            is on one device or spread by a `device_map`.
        name: What records call the model; its `name_or_path` by default.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float = 1.0,
        batch_size: int = 64,
        name: str | None = None,
    ) -> None:
        check_sampling(max_new_tokens, temperature, batch_size)
        self.model, self.processing_class = model, processing_class
        self.max_new_tokens, self.temperature, self.batch_size = max_new_tokens, temperature, batch_size
        self.name = name or model.config.name_or_path

    def describe(self) -> dict[str, Any]:
        """See `Sampler.describe`."""
        return {
            "engine": "transformers",
            "model": self.name,
            "revision": getattr(self.model.config, "_commit_hash", None),
            "template_hash": template_hash(self.processing_class.chat_template),
            "template_args": template_args_of(self.processing_class) or None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "versions": {package: version(package) for package in ("torch", "transformers")},
            "not_reproducible": "another device, precision or version of torch can round otherwise"
            + ("" if self.model.dtype == torch.float32 else ", and so can another batch in low precision"),
        }

    def __call__(self, draws: Sequence[Draw]) -> Iterator[tuple[Draw, Completion | Failure]]:
        """Yields each draw with its completion as its batch finishes; `OutOfMemoryError` where one does not fit."""
        rows = [
            _Row(i, draw.prompt, encode_prompt(self.processing_class, draw.prompt), draw.seed)
            for i, draw in enumerate(draws)
        ]
        for row, completion in _sample(
            self.model, self.processing_class, rows, self.max_new_tokens, self.temperature, self.batch_size
        ):
            yield draws[row.index], completion


def _sample(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    rows: Sequence[_Row],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> Iterator[tuple[_Row, Completion]]:
    """Longest prompts first, so that memory runs out at once if it does; then with half the batch from there on."""
    limit, ends = context_length(model.config), has_position_table(model)
    check_room([len(row.ids) for row in rows], [row.prompt for row in rows], max_new_tokens, limit, ends)
    waiting = sorted(rows, key=lambda row: -len(row.ids))
    with in_eval_mode(model):
        while waiting:
            batch = waiting[:batch_size]
            try:
                drawn = _sample_batch(model, processing_class, batch, max_new_tokens, temperature)
            except RuntimeError as error:
                if len(batch) == 1 or not (
                    isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
                ):
                    raise
                drawn = None
            if drawn is None:  # outside the handler: the error keeps the batch's tensors alive
                batch_size = len(batch) // 2
                logger.warning("Out of memory at %d completions together; on with %d.", len(batch), batch_size)
                gc.collect()
                clear_device_cache()
                continue
            waiting = waiting[len(batch) :]
            yield from zip(batch, drawn, strict=True)


@torch.no_grad()
def _sample_batch(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    rows: Sequence[_Row],
    max_new_tokens: int,
    temperature: float,
) -> list[Completion]:
    device, padding = input_device(model), pad_id(processing_class)
    inputs: dict[str, Any] = {**pad_tokens(processing_class, [row.ids for row in rows], device)}  # (batch, prompt)
    prompt_length = inputs["input_ids"].shape[1]
    # "response" needs no mask: `generate` knows the last prompt token
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if getattr(config, "positions", None) == "question_and_response":
        masks = [chat_mask(processing_class, row.prompt, "question_and_response") for row in rows]
        inputs["steering_mask"] = pad_rows(masks, 0, device)
    ends = model.generation_config.eos_token_id
    tokens = (*(ends if isinstance(ends, list) else [ends]), processing_class.eos_token_id)
    stops = {token for token in tokens if token is not None}
    texts = model.generation_config.stop_strings or []
    settings = {
        "pad_token_id": min(stops, default=padding),  # behind the end of a row that is shorter than others
        "eos_token_id": sorted(stops) or None,
        "tokenizer": processing_class,
    }

    def arguments(chosen: Sequence[int]) -> dict[str, Any]:
        some = [rows[i] for i in chosen]
        own: dict[str, Any] = {"logits_processor": LogitsProcessorList()}
        if temperature > 0:
            seeds = [row.seed for row in some]
            own["logits_processor"].append(GumbelLogitsProcessor(seeds, prompt_length, temperature, device))
        if rows[0].alpha is not None:
            own["alpha"] = torch.tensor([row.alpha for row in some], device=device)
        if rows[0].adapter is not None:
            own["adapter_names"] = [row.adapter for row in some]
        return {**settings, **own}

    with own_distribution(model):
        drawn_ids = generate_rows(model, inputs, arguments, max_new_tokens, [] if texts else sorted(stops))
    completions = []
    for row, ids in zip(rows, drawn_ids, strict=True):
        # text up to the first token that ends a turn; without one, the completion was cut off
        length = next((i for i, token in enumerate(ids) if token in (stops or {padding})), len(ids))
        text = decode_completion(processing_class, row.prompt, row.ids, ids[:length])
        ended_by_text = any(stop in text for stop in ([texts] if isinstance(texts, str) else texts))
        ended = length < len(ids) and not ended_by_text
        drawn = tuple(ids[: length + ended])
        completions.append(
            Completion(
                text,
                truncated=not (ended or ended_by_text),
                prompt_tokens=len(row.ids),
                completion_tokens=len(drawn),
                ids=drawn,
                opened=_ends_inside_reasoning(processing_class, row.prompt),
            )
        )
    return completions


def _ends_inside_reasoning(processing_class: PreTrainedTokenizerBase, prompt: Prompt) -> bool:
    """Whether the template has opened reasoning, or the beginning of the answer that the prompt holds has."""
    begun = content_text(prompt[-1]) if begins_answer(prompt) else ""  # type: ignore[arg-type]
    return opens_reasoning(render_prompt(processing_class, prompt)) or split_reasoning(begun).answer is None


@contextmanager
def own_distribution(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, `generate` takes the likeliest token of the model's own distribution, until the model ends its turn.

    Nothing else that its generation settings ask for is applied: no truncations, penalties, biases, watermarks and
    suppressed tokens, no other way of decoding, no other outputs, no limits in length or time.
    """
    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in KEPT_SETTINGS}
    plain = GenerationConfig(**{name: value for name, value in kept.items() if value is not None})
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # PEFT hands its wrapper's settings, if they are of its own, on to the model
    with attribute(base, "generation_config", plain), attribute(model, "generation_config", plain):
        yield
