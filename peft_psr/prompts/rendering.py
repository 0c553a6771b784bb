"""The one call of `apply_chat_template`: what a tokenizer or its template can't do is said in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from .messages import Message


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateRefusal(TemplateError, ValueError):
    """A chat template has no place for a conversation, for a `reason` in its own words.

    A `ValueError` too, so that users read one line.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_tokenizer(processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless conversations can be rendered as text and that text be encoded.

    mistral-common's tokenizers have no template, and take special tokens that stand in a text for letters.
    """
    name = processing_class.name_or_path
    if any(base.__name__.startswith("MistralCommon") for base in type(processing_class).__mro__):
        raise ValueError(
            f"The tokenizer of {name!r} is mistral-common's ({type(processing_class).__name__}), which has no chat "
            "template and encodes no special tokens from text. Take a model with a tokenizer.json and a chat "
            "template, and load its tokenizer with `AutoTokenizer.from_pretrained(..., mistral_format=False)`, or "
            "without the package mistral-common installed."
        )
    if processing_class.chat_template is None:
        raise ValueError(
            f"The tokenizer of {name!r} has no chat template. Set `tokenizer.chat_template` (--chat-template), or "
            "give plain-text prompts (str) instead of messages."
        )


def apply_template(processing_class: PreTrainedTokenizerBase, messages: Sequence[Message], **settings: Any) -> str:
    """A conversation as text; `settings` of `apply_chat_template` say what its end is.

    Raises:
        TemplateRefusal: the template refuses the conversation (Gemma's a system turn) or is broken.
        ValueError: as `check_tokenizer`.
    """
    check_tokenizer(processing_class)
    try:
        return cast(str, processing_class.apply_chat_template(list(messages), tokenize=False, **settings))
    except (TemplateError, TypeError) as error:  # a template adds texts, and content may be null
        roles = [str(message.get("role")) for message in messages]
        way_out = " Put what the system turn says into the user's turn: placement='before'."
        raise TemplateRefusal(
            f"The chat template of {processing_class.name_or_path!r} refuses the turns {', '.join(roles)} ({error})."
            f"{way_out if 'system' in roles else ''}",
            str(error),
        ) from error
