"""Which tokens are edited: 0/1 masks of shape (batch, seq), at training, in plain forward calls and while generating.

- `response`: from the last prompt token, included, to the end.
- `question_and_response`: from the last token of the system turn, included, to the end.
- `all`: every token that is not padding.

Source: METHOD of arXiv 2605.03907 as reported by reimplementers; leaving out the last prompt token makes training and
generation disagree.
"""

import os
import re
from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peft_psr.prompts.conversations import Prompt, begins_answer, encode_prompt, pad_id, render_prompt, render_turns
from peft_psr.prompts.messages import Message, content_text

from .config import POSITIONS


# Stands for a turn's text when looking for where it ends or begins; no template's default system turn ends in it.
_SENTINEL = "zq"
_MARK = re.compile(r"\w*<\|\w+\|>")
# Most of them that a model writes before its answer: <|channel|>final<|message|>.
_MOST_MARKS = 2


def last_token_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """True at the last token of each row that is not padding (0 in the mask) on either side; both are (batch, seq)."""
    seen = attention_mask.long().cumsum(dim=-1)
    return (seen == seen[:, -1:]) & attention_mask.bool()


def response_mask(labels: torch.Tensor) -> torch.Tensor:
    """The response, which is where `labels` are not -100, plus the token before it; (batch, seq) bool."""
    response = labels != -100
    mask = response.clone()
    mask[:, :-1] |= response[:, 1:]
    return mask


def default_mask(positions: str, attention_mask: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The mask of a call that was given none, (batch, seq) bool.

    With `labels` the response is known; without, the input is taken for a prompt. Where the question starts can't be
    told from ids alone, so `question_and_response` counts every token that is not padding as question:
    `encode_chat` builds the exact mask.

    Args:
        positions: One of `POSITIONS`.
        attention_mask: (batch, seq), 0 on padding.
        labels: (batch, seq) with -100 outside the response, or `None`.
    """
    if positions != "response":
        return attention_mask.bool()
    return last_token_mask(attention_mask) if labels is None else response_mask(labels)


def common_suffix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many last items `a` and `b` share."""
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return length


def question_start(processing_class: PreTrainedTokenizerBase, messages: Sequence[Message]) -> int:
    """Index of the first edited token for `question_and_response`: the last token of the system turn, if there is one.

    The user's part is what the rendered prompt shares, from the right, with the same prompt under another system text.
    Where a template adds a system turn of its own, the tokens that close that turn count as its end too. Without a
    system turn it is the first token of the user's part; 0 for a template without that role.
    """
    ids = encode_prompt(processing_class, messages)
    turns = [message for message in messages if message["role"] != "system"]
    bare = encode_prompt(processing_class, turns)
    try:
        other = encode_prompt(processing_class, [{"role": "system", "content": _SENTINEL}, *turns])
    except TemplateError:  # how a template says that it has no system role
        return 0
    shared = common_suffix_length(ids, bare if len(turns) < len(messages) else other)
    before_user_part = len(bare) - common_suffix_length(bare, other)
    has_default_system_turn = before_user_part > 1  # more than a BOS token
    ends_system_turn = len(turns) < len(messages) and not has_default_system_turn
    return len(ids) - shared - (1 if ends_system_turn else 0)


def chat_mask(processing_class: PreTrainedTokenizerBase, messages: Prompt, positions: str = "response") -> list[int]:
    """Which tokens of a conversation, rendered with a generation prompt, are edited: one 0/1 a token.

    In plain text, which has no turns, every token is question.

    Earlier assistant turns get the edits they had when they were generated: the token before the turn and the turn's
    own tokens, without the one that closes it. A turn of the assistant's at the end, which the answer goes on from,
    was not generated: of it the last token is edited, as the prompt's last.

    Raises:
        ValueError: `positions` is unknown, or the template rewrites earlier turns as the conversation goes on, so that
            what was generated can't be found again.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(map(repr, POSITIONS))}, got {positions!r}.")
    ids = encode_prompt(processing_class, messages)
    if positions == "question_and_response" and not isinstance(messages, str):
        start = question_start(processing_class, messages)
        return [0] * start + [1] * (len(ids) - start)
    if positions != "response":
        return [1] * len(ids)
    mask = [0] * len(ids)
    mask[-1] = 1
    if isinstance(messages, str):
        return mask
    text = render_prompt(processing_class, messages)
    for index, message in enumerate(messages[:-1] if begins_answer(messages) else messages):
        if message["role"] != "assistant":
            continue
        content = content_text(message).strip()
        found = _start_of_turn(processing_class, messages[:index], text, content)
        if found is None:
            raise ValueError(
                f"The chat template changes turn {index} ({content[:40]!r}) once the conversation goes on, "
                "so its tokens can't be found. Pass a `steering_mask` of your own."
            )
        turn_start, content_start = found
        end = content_start + len(content)
        first = len(processing_class(text[:turn_start], add_special_tokens=False)["input_ids"])
        last = len(processing_class(text[:end], add_special_tokens=False)["input_ids"])
        mask[first - 1 : last] = [1] * (last - first + 1)
    return mask


def _start_of_turn(
    processing_class: PreTrainedTokenizerBase, earlier: Sequence[Message], text: str, content: str
) -> tuple[int, int] | None:
    """Where an assistant's turn and its content start in the text of a conversation; `None` if that can't be told."""
    if earlier:
        opened = render_turns(processing_class, earlier, add_generation_prompt=True)
    else:  # transformers renders no conversation without turns
        greeting = render_turns(processing_class, [{"role": "assistant", "content": _SENTINEL}])
        opened = greeting.rpartition(_SENTINEL)[0]
    start = least = len(os.path.commonprefix([text, opened]))
    if start < len(opened) and earlier:
        # Templates of models that think leave out of an earlier turn what begins or ends its reasoning in the prompt:
        # the two part in the assistant's header, or behind first letters of the content that happen to be alike.
        least = len(render_turns(processing_class, earlier))
    for place in range(start, least - 1, -1):
        after = text[place:].lstrip()  # templates may put a blank before an answer, or trim it
        if after.startswith(content):
            return place, len(text) - len(after)
    end = start
    for _ in range(_MOST_MARKS):
        mark = _MARK.match(text, end)
        if mark is None:
            return None
        end = mark.end()
        if text.startswith(content, end):
            return start, end
    return None


def encode_chat(
    processing_class: PreTrainedTokenizerBase,
    conversations: Sequence[Prompt],
    positions: str = "response",
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """A batch of conversations, padded on the left and ready for `model.generate(**batch)`, with its steering mask.

    Args:
        processing_class: A tokenizer with a chat template.
        conversations: Each a list of messages (or plain text) that ends before the assistant's answer.
        positions: One of "response", "question_and_response", "all"; give the adapter's own (`PSRConfig.positions`).
        device: Where the tensors go.

    Returns:
        `input_ids`, `attention_mask` and `steering_mask`, each (batch, seq) int64.
    """
    ids = [encode_prompt(processing_class, conversation) for conversation in conversations]
    masks = [chat_mask(processing_class, conversation, positions) for conversation in conversations]
    return {**pad_tokens(processing_class, ids, device), "steering_mask": pad_rows(masks, 0, device)}


def pad_tokens(
    processing_class: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    device: torch.device | str | None = None,
    side: str = "left",
) -> dict[str, torch.Tensor]:
    """Texts of unequal length, by their tokens, as `input_ids` and `attention_mask`, each (batch, longest) int64.

    The padding stands on the `side` "left", as for `generate`, or "right".
    """
    return {
        "input_ids": pad_rows(ids, pad_id(processing_class), device, side),
        "attention_mask": pad_rows([[1] * len(row) for row in ids], 0, device, side),
    }


def pad_rows(
    rows: Sequence[Sequence[int]], value: int, device: torch.device | str | None = None, side: str = "left"
) -> torch.Tensor:
    """Rows of unequal length as one (batch, longest) int64 tensor, filled with `value` on the given side."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [[*pad, *row] if side == "left" else [*row, *pad] for row, pad in zip(rows, fill, strict=True)]
    return torch.tensor(padded, dtype=torch.long, device=device)
