"""The score of METHOD 6 from a transformers model's logits.

Where each number of 0-100 is one token, the score is read from the 20 likeliest first tokens, as from a server. Where
numbers are several tokens (most often digits), the probability of each number is worked out in full,

    p(n) = p(t_1) p(t_2 | t_1) ... (1 - sum_c p(c | t_1 ... t_k)),

with t the tokens of n and c the tokens that would turn n into another number of 0-100: 8 is 8 only if no 0-9
follows. The prompt is read once; the ten or so beginnings of numbers are then tried on its cache.

As from a server, what follows a number decides whether it is one: where the likeliest answer opens with a number, its
first `ANSWER_TOKENS` tokens are read as text, and if that is no score (8/10, a list, a count) there is none. What
would follow the less likely numbers is not looked at.
"""

import copy
import inspect
import json
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.base_model.caches import cache_name, cache_of
from peft_psr.files import sha256
from peft_psr.positions import pad_tokens
from peft_psr.prompts.conversations import decode, encode_prompt, encode_text, render_prompt, render_turns
from peft_psr.training.data.draws import template_hash
from peft_psr.training.passes.partial import in_eval_mode, input_device

from .answer_score import TOP_TOKENS, number_masses, weighted_mean
from .score_text import score_text


Tokens = tuple[int, ...]

ANSWER_TOKENS = 8
"""Enough for " out of 100" after the digits of a number."""


@torch.no_grad()
def read_scores(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    numbers: dict[int, Tokens],
) -> list[float | None]:
    """The score in the model's answer to each prompt's tokens, read together; `None` where it holds none.

    `numbers` are the tokens of each, as `number_tokens` gives them.
    """
    batch = pad_tokens(processing_class, prompts, input_device(model))
    mask = batch["attention_mask"]
    with in_eval_mode(model):
        read = _forward(model, batch["input_ids"], mask)
        if all(len(tokens) == 1 for tokens in numbers.values()):
            first = read.logits[:, -1].float().log_softmax(-1)
            top = first.topk(min(TOP_TOKENS, first.shape[-1]))
            masses = [
                number_masses([(decode(processing_class, [t]), p) for t, p in zip(tokens, logprobs, strict=True)])
                for tokens, logprobs in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
        else:
            masses = number_probabilities(model, read, mask, numbers)
        scores = [weighted_mean(row) for row in masses]
        numerals = {tokens[0] for tokens in numbers.values()}
        opens = [token in numerals for token in read.logits[:, -1].argmax(-1).tolist()]
        if any(numeral and score is not None for numeral, score in zip(opens, scores, strict=True)):
            said = _likeliest_answers(model, processing_class, read, mask)
            scores = [
                None if numeral and score_text(*answer) is None else score
                for numeral, answer, score in zip(opens, said, scores, strict=True)
            ]
    return scores


def _likeliest_answers(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    read: Any,
    attention_mask: torch.Tensor,
) -> list[tuple[str, bool]]:
    """How the likeliest answer to each prompt begins, and whether it goes on beyond that; uses the cache up."""
    chosen = [read.logits[:, -1].argmax(-1, keepdim=True)]  # (batch, 1) each
    for _ in range(ANSWER_TOKENS - 1):
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
        read = _forward(model, chosen[-1], attention_mask, cache_of(read))
        chosen.append(read.logits[:, -1].argmax(-1, keepdim=True))
    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), processing_class.eos_token_id}
    answers = []
    for row in torch.cat(chosen, dim=1).tolist():
        length = next((i for i, token in enumerate(row) if token in stops), len(row))
        text = decode(processing_class, row[:length], skip_special_tokens=True)
        answers.append((text, length == len(row)))
    return answers


def number_tokens(processing_class: PreTrainedTokenizerBase) -> dict[int, Tokens]:
    """The tokens of each number of 0-100 where an assistant's answer begins.

    Raises:
        ValueError: the tokenizer has no chat template, no tokens for the numbers, or merges an answer's first letters
            with what is before.
    """
    prompt = [{"role": "user", "content": "?"}]
    before = render_prompt(processing_class, prompt)
    opened = encode_prompt(processing_class, prompt)
    found = {}
    for number in range(101):
        # a template may put a blank before the answer
        turns = [*prompt, {"role": "assistant", "content": str(number)}]
        closed = render_turns(processing_class, turns)
        rest = closed[len(before) :] if closed.startswith(before) else ""
        blank = rest[: len(rest) - len(rest.lstrip())] if rest.lstrip().startswith(str(number)) else ""
        ids = encode_text(processing_class, f"{before}{blank}{number}", prompt)
        if ids[: len(opened)] != opened or len(ids) == len(opened):
            raise ValueError(
                f"The tokenizer of {processing_class.name_or_path!r} merges the answer {number} with the end of the "
                "prompt: it can't be a local judge. Serve the model and use ServerJudge."
            )
        found[number] = tuple(ids[len(opened) :])
    if len(set(found.values())) < len(found):
        raise ValueError(
            f"The tokenizer of {processing_class.name_or_path!r} has no tokens for the numbers 0-100, so its model "
            "can't be a judge."
        )
    return found


def number_probabilities(
    model: PreTrainedModel | PeftModel, read: Any, attention_mask: torch.Tensor, numbers: dict[int, Tokens]
) -> list[dict[int, float]]:
    """The probability of each number as the model's answer, for each row; the formula is at the top of this module.

    `read` is what it made of the prompts, padded on the left as `attention_mask` (batch, seq) says: logits of the last
    token, and a cache that is left as it is. No two numbers have the same tokens.
    """
    beginnings = {tokens[:length] for tokens in numbers.values() for length in range(1, len(tokens))}
    longest = [b for b in beginnings if not any(b == other[: len(b)] and b != other for other in beginnings)]
    after: dict[Tokens, torch.Tensor] = {}  # log-probabilities (batch, vocabulary), by the tokens before
    after[()] = read.logits[:, -1].float().log_softmax(-1)
    for beginning in sorted(longest):
        rows = torch.tensor([beginning], device=attention_mask.device).expand(len(attention_mask), -1)
        mask = torch.cat([attention_mask, torch.ones_like(rows)], dim=1)
        logits = _forward(model, rows, mask, copy.deepcopy(cache_of(read))).logits
        for place in range(len(beginning)):
            after[beginning[: place + 1]] = logits[:, place].float().log_softmax(-1)
    probabilities = {}
    for number, tokens in numbers.items():
        steps = [after[tokens[:place]][:, token] for place, token in enumerate(tokens)]
        probability = torch.stack(steps).sum(0).exp()
        if tokens in beginnings:
            longer = {t[len(tokens)] for t in numbers.values() if t[: len(tokens)] == tokens and t != tokens}
            probability = probability * (1 - after[tokens][:, sorted(longer)].exp().sum(-1))
        probabilities[number] = probability.tolist()
    return [{number: rows[i] for number, rows in probabilities.items()} for i in range(len(attention_mask))]


def _forward(
    model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Any = None
) -> Any:
    """Logits of the last token, or of all that follow `cache`, at positions that skip the padding."""
    forward = getattr(model, "get_base_model", lambda: model)().forward
    takes = inspect.signature(forward).parameters
    extra: dict[str, Any] = {cache_name(forward): cache}
    if "position_ids" in takes:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        extra["position_ids"] = positions[:, -input_ids.shape[1] :]
    if "logits_to_keep" in takes and cache is None:
        extra["logits_to_keep"] = 1
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **extra)


def model_identity(model: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Name, revision, weights and template: two models of one name are told apart by some of their weights."""
    sample = []
    for name, parameter in model.named_parameters():
        sample.append(json.dumps([name, list(parameter.shape), str(parameter.dtype)]))
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            some = flat[:: max(1, flat.numel() // 16)][:32]
            sample.append(json.dumps(some.float().tolist()))
    return {
        "model": model.config.name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights_sample": sha256("".join(sample)),
        "template_hash": template_hash(processing_class.chat_template),
    }
