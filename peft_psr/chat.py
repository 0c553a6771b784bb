"""Prompts and completions as token ids: a chat template for conversations, plain tokenization for plain text."""

from __future__ import annotations

from collections.abc import Sequence

from .judging import Message
from .templates import apply_template


Prompt = str | Sequence[Message]
"""A conversation that ends before the assistant's answer, or plain text for a model without a chat template."""


def render_prompt(processing_class, prompt: Prompt) -> str:
    """The text that the model is to continue: the chat template with its generation prompt, or `prompt` itself.

    Raises:
        ValueError: a conversation is given and the tokenizer has no chat template, or one that refuses it.
    """
    return prompt if isinstance(prompt, str) else apply_template(processing_class, prompt, add_generation_prompt=True)


def encode_text(processing_class, text: str, prompt: Prompt) -> list[int]:
    """Token ids of `text`, which starts with the rendered `prompt`; a chat template brings its own special tokens."""
    return processing_class(text, add_special_tokens=isinstance(prompt, str))["input_ids"]


def _without_eos(processing_class, ids: list[int]) -> list[int]:
    """Some tokenizers close plain text with an end token; a prompt is to be continued."""
    return ids[:-1] if ids and ids[-1] == processing_class.eos_token_id else ids


def encode_prompt(processing_class, prompt: Prompt) -> list[int]:
    """Token ids of the rendered prompt, ready to be continued."""
    ids = encode_text(processing_class, render_prompt(processing_class, prompt), prompt)
    return _without_eos(processing_class, ids) if isinstance(prompt, str) else ids


def pad_id(processing_class) -> int:
    """The padding token, or the EOS token where a tokenizer has none, or the first: it is masked, whatever it is."""
    ids = (processing_class.pad_token_id, processing_class.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def turn_end_id(processing_class, prompt: Prompt) -> int | None:
    """The token that closes an assistant's turn: the first one the template puts after it, else the EOS token."""
    if isinstance(prompt, str):
        return None
    answer = "ok"
    closed = apply_template(
        processing_class, [*prompt, {"role": "assistant", "content": answer}], add_generation_prompt=False
    )
    opened = render_prompt(processing_class, prompt) + answer
    closing = closed[len(opened) :] if closed.startswith(opened) else ""
    ids = processing_class(closing, add_special_tokens=False)["input_ids"] if closing else []
    return ids[0] if ids else processing_class.eos_token_id


def encode_completion(processing_class, prompt: Prompt, completion: str, truncated: bool = False) -> list[int]:
    """Token ids of `completion` as a continuation of `prompt`, tokenized together with it.

    Args:
        processing_class: A tokenizer.
        prompt: Conversation or plain text.
        completion: The assistant's answer.
        truncated: The answer was cut off, so no end-of-turn token follows.

    Raises:
        ValueError: the completion's first letters merge with the prompt's last ones into one token.
    """
    prompt_ids = encode_prompt(processing_class, prompt)
    text = render_prompt(processing_class, prompt) + completion
    ids = encode_text(processing_class, text, prompt)
    if isinstance(prompt, str):
        ids = _without_eos(processing_class, ids)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            f"The completion {completion[:60]!r} does not start at a token boundary after its prompt: the tokenizer "
            "merges the two. Strip leading blanks from the completion, or end the prompt in a blank or newline."
        )
    end = None if truncated else turn_end_id(processing_class, prompt)
    return ids[len(prompt_ids) :] + ([] if end is None else [end])
