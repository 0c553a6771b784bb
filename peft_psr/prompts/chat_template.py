"""A tokenizer's chat template with arguments of its own (`enable_thinking`, ...), which become part of the template.

Whoever renders with that tokenizer then renders alike, in drawing, training, chat and evaluation, and the template's
hash tells runs with other arguments apart. They are set in the template's first line, as `apply_chat_template` would
set them:

    {#- peft-psr {"enable_thinking": false} #}{% set enable_thinking = False %}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_psr.files import check_file
from peft_psr.text import read_text


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FIRST_LINE = re.compile(r"\{#- peft-psr (\{.*?\}) #\}.*?\n")
_TAKEN = {"messages", "add_generation_prompt", "continue_final_message", "tokenize", "true", "false", "none"}


def set_chat_template(
    processing_class: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> None:
    """Give a tokenizer a chat template, or arguments for the one that it has; in place.

    Args:
        processing_class: A tokenizer.
        chat_template: A Jinja template; `None` keeps the tokenizer's own.
        template_args: {name: JSON value}, in place of any that were set so before; `None` keeps the template's.

    Raises:
        TypeError: a value is not JSON.
        ValueError: there is no template, or an argument's name can't be one.
    """
    if chat_template is not None:
        processing_class.chat_template = chat_template
    if template_args is None:
        return
    check_template_args(template_args)
    templates = processing_class.chat_template
    if not templates:
        if not template_args:
            return
        raise ValueError(
            f"The tokenizer of {processing_class.name_or_path!r} has no chat template to give the arguments "
            f"{dict(template_args)} to; name one with chat_template (--chat-template)."
        )
    if isinstance(templates, Mapping):
        processing_class.chat_template = {name: _with_args(text, template_args) for name, text in templates.items()}
    else:
        processing_class.chat_template = _with_args(templates, template_args)


def check_template_args(template_args: Mapping[str, Any]) -> None:
    """Raise `TypeError` for a value that is not JSON, `ValueError` for no name, or one of rendering's or Jinja's."""
    for name in template_args:
        if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
            raise ValueError(
                f"template_args: {name!r} can't be an argument of a chat template; give names that the template "
                'reads, such as {"enable_thinking": false}.'
            )
    try:
        json.dumps(template_args, allow_nan=False)
    except ValueError as error:
        raise TypeError(f"template_args: {dict(template_args)!r} is not JSON: {error}.") from error


def template_args_of(processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments that `set_chat_template` gave a tokenizer's template; empty where it gave none."""
    templates = getattr(processing_class, "chat_template", None)
    text = next(iter(templates.values()), "") if isinstance(templates, Mapping) else templates or ""
    first = _FIRST_LINE.match(text)
    return json.loads(first[1]) if first else {}


def read_chat_template(path: str | Path) -> str:
    """A chat template from a file, as `--chat-template` names it; `ValueError` if it is empty or not UTF-8."""
    file = Path(path).expanduser()
    check_file(file, "chat_template")
    try:
        text = read_text(file)
    except ValueError as error:
        raise ValueError(f"chat_template: {error}") from error
    if not text.strip():
        raise ValueError(f"chat_template: {path} is empty.")
    return text


def _with_args(template: str, template_args: Mapping[str, Any]) -> str:
    template = _FIRST_LINE.sub("", template, count=1) if _FIRST_LINE.match(template) else template
    if not template_args:
        return template
    ordered = dict(sorted(template_args.items()))
    described = json.dumps(ordered).replace("#", "\\u0023")
    settings = "".join(f"{{% set {name} = {value!r} %}}" for name, value in ordered.items())
    return f"{{#- peft-psr {described} #}}{settings}\n{template}"  # which leaves out a line's end behind a block
