"""Prompts and completions as token ids: a chat template for conversations, plain tokenization for plain text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from .messages import Message, content_text
from .rendering import apply_template, check_tokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Prompt = str | Sequence[Message]
"""A conversation up to the assistant's answer, or plain text for a model without a chat template.

Where the last turn is the assistant's own, the answer goes on from it.
"""


def turn_texts(prompt: Prompt, role: str | None = None) -> list[str]:
    """The text of each turn, or of each with a role; plain text is a turn of the user's. Raises as `content_text`."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [content_text(turn) for turn in turns if role is None or turn["role"] == role]


def last_text(prompt: Prompt) -> str:
    """The text of the last turn: the question, as a rule. Raises as `content_text`."""
    return prompt if isinstance(prompt, str) else content_text(prompt[-1])


def prompt_text(prompt: Prompt) -> str:
    """A prompt for a reader, or a judge, who knows no chat template: a single turn as it is, several with their roles.

    Raises as `content_text`.
    """
    texts = turn_texts(prompt)
    if isinstance(prompt, str) or len(prompt) == 1:
        return texts[0]
    return "\n\n".join(f"{turn['role']}: {text}" for turn, text in zip(prompt, texts, strict=True))


# Stands for a turn's text when looking for it in a rendered prompt.
_SENTINEL = "zqxj"


def render_prompt(processing_class: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the model is to continue: the chat template with its generation prompt, or `prompt` itself.

    An assistant's turn at the end is left open. Raises as `apply_template` and `content_text`.
    """
    if isinstance(prompt, str):
        return prompt
    if not begins_answer(prompt):
        return render_turns(processing_class, prompt, add_generation_prompt=True)
    return apply_template(processing_class, _as_taken(processing_class, prompt), continue_final_message=True)


def render_turns(
    processing_class: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    """Turns that have all come to their end, as the chat template writes them."""
    turns = _as_taken(processing_class, messages)
    return apply_template(processing_class, turns, add_generation_prompt=add_generation_prompt)


def begins_answer(prompt: Prompt) -> bool:
    """Whether a conversation ends with the beginning of the assistant's answer (a prefill)."""
    return not isinstance(prompt, str) and len(prompt) > 0 and prompt[-1].get("role") == "assistant"


def _as_taken(processing_class: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """Turns with their contents as the template takes them: as text, or in parts where it knows no other."""
    check_tokenizer(processing_class)
    as_text = _takes_text(processing_class, str(processing_class.chat_template))
    taken = []
    for message in messages:
        if message.get("content") is None and message.get("tool_calls"):
            taken.append(message)
            continue
        text = content_text(message)
        taken.append({**message, "content": text if as_text else [{"type": "text", "text": text}]})
    return taken


@lru_cache(maxsize=64)
def _takes_text(processing_class: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template shows a user's text that is no list of parts; `template` tells a changed one."""
    turn: list[Any] = [{"role": "user", "content": _SENTINEL}]
    try:
        rendered = processing_class.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError):  # it wants a system turn, say
        return True
    return _SENTINEL in rendered


def encode_text(processing_class: PreTrainedTokenizerBase, text: str, prompt: Prompt) -> list[int]:
    """Token ids of `text`, which starts with the rendered `prompt`; a chat template brings its own special tokens."""
    return processing_class(text, add_special_tokens=isinstance(prompt, str))["input_ids"]


def _without_eos(processing_class: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Some tokenizers close plain text with an end token; a prompt is to be continued."""
    return ids[:-1] if ids and ids[-1] == processing_class.eos_token_id else ids


def encode_prompt(processing_class: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of the rendered prompt, ready to be continued."""
    ids = encode_text(processing_class, render_prompt(processing_class, prompt), prompt)
    return _without_eos(processing_class, ids) if isinstance(prompt, str) else ids


def decode_completion(
    processing_class: PreTrainedTokenizerBase, prompt: Prompt, prompt_ids: Sequence[int], ids: Sequence[int]
) -> str:
    """A completion's `ids` as text, to be put right behind its prompt (`prompt_ids`: from `encode_prompt`).

    Special tokens in it are part of the text.
    """
    if not isinstance(prompt, str):
        return decode(processing_class, ids)
    # together with the prompt: many decoders drop a blank that their text begins with
    return decode(processing_class, [*prompt_ids, *ids])[len(decode(processing_class, prompt_ids)) :]


def decode(processing_class: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of token ids."""
    return cast(str, processing_class.decode(list(ids), skip_special_tokens=skip_special_tokens))


def pad_id(processing_class: PreTrainedTokenizerBase) -> int:
    """The padding token, or the EOS token where a tokenizer has none, or any: padding is masked, whatever it is."""
    tokens = (processing_class.pad_token_id, processing_class.eos_token_id)
    return next((token for token in tokens if token is not None), 0)


def turn_end_id(processing_class: PreTrainedTokenizerBase, prompt: Prompt) -> int | None:
    """The token that closes an assistant's turn: the first one the template puts after it, else the EOS token."""
    if isinstance(prompt, str):
        return None
    answer = "ok"
    before, said = (prompt[:-1], content_text(prompt[-1])) if begins_answer(prompt) else (prompt, "")
    closed = render_turns(processing_class, [*before, {"role": "assistant", "content": said + answer}])
    opened = render_prompt(processing_class, prompt) + answer
    closing = closed[len(opened) :] if closed.startswith(opened) else ""
    ids = processing_class(closing, add_special_tokens=False)["input_ids"] if closing else []
    return ids[0] if ids else processing_class.eos_token_id


def encode_completion(
    processing_class: PreTrainedTokenizerBase, prompt: Prompt, completion: str, truncated: bool = False
) -> list[int]:
    """Token ids of `completion` as a continuation of `prompt`, tokenized together with it where that leaves it whole.

    A `truncated` one was cut off, so that no end-of-turn token follows.

    Raises:
        ValueError: the completion's first letters merge with the prompt's last ones into one token, and the tokenizer
            can't spell it by itself.
    """
    prompt_ids = encode_prompt(processing_class, prompt)
    text = render_prompt(processing_class, prompt) + completion
    ids = encode_text(processing_class, text, prompt)
    if isinstance(prompt, str):
        ids = _without_eos(processing_class, ids)
    drawn = ids[len(prompt_ids) :]
    if ids[: len(prompt_ids)] != prompt_ids:
        # a model goes on from the prompt's own tokens, whatever the tokenizer would make of the two together
        drawn = processing_class(completion, add_special_tokens=False)["input_ids"]
        if decode_completion(processing_class, prompt, prompt_ids, drawn) != completion:
            raise ValueError(
                f"The completion {completion[:60]!r} does not start at a token boundary after its prompt: the "
                "tokenizer merges the two. Strip leading blanks from the completion, or end the prompt in a blank or "
                "newline."
            )
    end = None if truncated else turn_end_id(processing_class, prompt)
    return drawn + ([] if end is None else [end])
