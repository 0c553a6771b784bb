"""Where a steering instruction stands in the prompt: x' is x with the instruction put into it.

x is what the user would send, rendered by the chat template, with the default system turn that some templates add by
themselves (Qwen2.5). An instruction in the system turn takes the place of such a default, as any system message does;
to keep its text in x', give it to x as a system message of its own: x renders the same, and x' extends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from peft_psr.prompts.conversations import Prompt, render_prompt
from peft_psr.prompts.messages import Message, content_text
from peft_psr.prompts.rendering import TemplateRefusal


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Placement = Literal["system", "before", "after"]
PLACEMENTS: tuple[Placement, ...] = ("system", "before", "after")
"""In the system turn, first; or in the last user turn, before or after its text, a blank line between."""

# Stands for an instruction when looking for it in a rendered prompt.
_SENTINEL = "zqxj"
_WAY_OUT = "Use placement='before', which puts the instruction before the user's text."


@overload
def add_instruction(prompt: str, instruction: str, placement: Placement = "system") -> str: ...
@overload
def add_instruction(prompt: Sequence[Message], instruction: str, placement: Placement = "system") -> list[Message]: ...
def add_instruction(prompt: Prompt, instruction: str, placement: Placement = "system") -> Prompt:
    """Make x' from x, messages up to the assistant's turn or plain text; an empty instruction changes nothing.

    Plain text has no system turn, so it takes the other two of `PLACEMENTS`.

    Raises:
        ValueError: `placement` is unknown, or there is no turn of that kind in the prompt.
    """
    _check_known(placement)
    if not instruction:
        return prompt if isinstance(prompt, str) else list(prompt)
    if isinstance(prompt, str):
        if placement == "system":
            raise ValueError(f"Plain text has no system turn for an instruction to stand in. {_WAY_OUT}")
        return _join(prompt, instruction, placement)
    turns = list(prompt)
    if placement == "system":
        if turns and turns[0]["role"] == "system":
            return [{**turns[0], "content": _join(turns[0]["content"], instruction, "before")}, *turns[1:]]
        return [{"role": "system", "content": instruction}, *turns]
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise ValueError(f"placement={placement!r} needs a user turn, got roles {[t['role'] for t in turns]}.")
    asked = turns[users[-1]]
    content_text(asked)
    turns[users[-1]] = {**asked, "content": _join(asked["content"], instruction, placement)}
    return turns


def check_placement(processing_class: PreTrainedTokenizerBase, placement: Placement) -> None:
    """Raise unless an instruction so placed reaches the model; to be called before any long work.

    Raises:
        ValueError: `placement` is unknown, or it is "system" and the tokenizer has no chat template, or one that
            refuses the system role (Gemma) or leaves its text out.
    """
    _check_known(placement)
    if placement != "system":
        return
    model = processing_class.name_or_path
    if processing_class.chat_template is None:
        raise ValueError(f"The tokenizer of {model!r} has no chat template, so no system turn. {_WAY_OUT}")
    turns = [{"role": "system", "content": _SENTINEL}, {"role": "user", "content": "hello"}]
    try:
        text = render_prompt(processing_class, turns)
    except TemplateRefusal as error:
        raise ValueError(
            f"The chat template of {model!r} takes no system turn ({error.reason}). {_WAY_OUT}"
        ) from error
    if _SENTINEL not in text:
        raise ValueError(f"The chat template of {model!r} leaves the system turn's text out. {_WAY_OUT}")


def _check_known(placement: str) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(map(repr, PLACEMENTS))}, got {placement!r}.")


def _join(content: Any, instruction: str, placement: Placement) -> Any:
    """A turn's content with the instruction, a blank line between; parts stay parts."""
    if isinstance(content, list):
        blank = {"before": f"{instruction}\n\n", "after": f"\n\n{instruction}"}[placement]
        part = {"type": "text", "text": blank}
        return [part, *content] if placement == "before" else [*content, part]
    return f"{instruction}\n\n{content}" if placement == "before" else f"{content}\n\n{instruction}"
