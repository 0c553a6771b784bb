"""Triplets (x, x', y'): a plain prompt, the same with a trait-eliciting instruction, a completion of the latter.

One JSON object a line, in TRL's conversational format with two more fields for the scores; see `Triplet`.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, TypedDict

from peft_psr.files import as_json_lines, has_half_pair, write_whole
from peft_psr.prompts.conversations import Prompt
from peft_psr.prompts.messages import Message, content_text
from peft_psr.text import parse_json


SCORES = ("trait_score", "coherence_score")
STATE, TRIPLETS, NEGATIVES = "run.json", "triplets.jsonl", "negatives.jsonl"
"""Files of a run of `psr triplets`: what it is, what it kept, and what it kept of draws for the opposite."""


class _Required(TypedDict):
    prompt: Prompt
    steered_prompt: Prompt
    completion: str


class Triplet(_Required, total=False):
    """One training example.

    Attributes:
        prompt: x, messages up to the assistant's turn (or plain text for a model without a chat template).
        steered_prompt: x', the same with the instruction.
        completion: y', sampled on x'.
        trait_score: How strongly y' shows the trait, 0-100, or `None` if the judge could not tell.
        coherence_score: How coherent y' is as an answer to x, 0-100, or `None`.
        truncated: y' was cut off at the token limit, so no end of turn follows it.
        completion_ids: The tokens of y' as they were drawn, with the one that ends the turn; without them the text is
            tokenised.
        reasoning_opened: x' ends inside reasoning, which y' goes on with; it is judged by what follows.
    """

    trait_score: float | None
    coherence_score: float | None
    truncated: bool
    completion_ids: list[int]
    reasoning_opened: bool


def write_triplets(triplets: Iterable[Triplet], path: str | os.PathLike) -> None:
    """Write triplets as JSONL; the file is whole or as it was before."""
    write_whole(path, as_json_lines(triplets))


def read_triplets(path: str | os.PathLike) -> list[Triplet]:
    """Read triplets from JSONL.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty or not UTF-8, a line is no JSON object with `prompt`, `steered_prompt` and
            `completion`, or scores are given as 0-1; the message names the line.
    """
    triplets: list[Triplet] = []
    for _, found in scan_triplets(path):
        if isinstance(found, ValueError):
            raise found
        triplets.append(found)
    if not triplets:
        raise ValueError(f"{path} holds no triplets. Write some with `generate_triplets` and `write_triplets`.")
    check_scale(triplets, str(path))
    return triplets


def scan_triplets(path: str | os.PathLike) -> Iterator[tuple[int, Triplet | ValueError]]:
    """Yields the number of each line that is not empty, with its triplet or with what is wrong with it.

    Raises:
        FileNotFoundError, ValueError: no such file; it is UTF-16.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and (line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line):
                raise ValueError(f"{path} is UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > new.jsonl")
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    triplet = parse_json(text, where)
                    check_fields(triplet, where)
                    yield number, triplet
            except UnicodeDecodeError as error:
                yield (
                    number,
                    ValueError(
                        f"{where} is not UTF-8 (byte 0x{line[error.start]:02x}). Save the file as UTF-8; if it is "
                        f"Latin-1: iconv -f LATIN1 -t UTF-8 {path} > new.jsonl"
                    ),
                )
            except ValueError as error:
                yield number, error


def check_scale(triplets: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raise `ValueError`, naming `where`, if scores of 0-1 are given for 0-100: none above 1, some between."""
    scores = [triplet[name] for triplet in triplets for name in SCORES if triplet.get(name) is not None]
    if any(0 < score < 1 for score in scores) and max(scores) <= 1:
        raise ValueError(
            f"{where}: the scores seem to be on a scale of 0-1 (the highest is {max(scores):g}); trait_score and "
            "coherence_score are 0-100. Multiply them by 100."
        )


def check_triplet(triplet: object, where: str) -> None:
    """Raise `ValueError`, naming `where`, unless `triplet` has all that training needs."""
    check_fields(triplet, where)
    assert isinstance(triplet, Mapping)  # which check_fields has just seen
    for name in ("prompt", "steered_prompt", "completion"):
        if has_half_pair(json.dumps(triplet[name], ensure_ascii=False, default=str)):
            raise ValueError(
                f"{where}: {name} holds half a character (a surrogate without its other half, as of an "
                "emoji that was cut in two). Take it out."
            )


def check_fields(triplet: object, where: str) -> None:
    """Raise `ValueError`, naming `where`, unless `triplet` has the fields of a triplet."""
    if not isinstance(triplet, Mapping):
        raise ValueError(f"{where}: a triplet is an object, got {type(triplet).__name__}.")
    if others := [key for key in triplet if not isinstance(key, str)]:
        raise ValueError(f"{where}: the names of a triplet's fields are text, got {others[0]!r}.")
    missing = [name for name in ("prompt", "steered_prompt", "completion") if not triplet.get(name)]
    if missing:
        raise ValueError(
            f"{where}: {', '.join(missing)} missing or empty; a triplet has prompt, steered_prompt and completion."
        )
    if not isinstance(triplet["completion"], str):
        raise ValueError(f"{where}: completion must be text, got {triplet['completion']!r}.")
    for name in ("prompt", "steered_prompt"):
        messages = triplet[name]
        if not isinstance(messages, str) and not (
            isinstance(messages, Sequence)
            and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages)
        ):
            raise ValueError(f"{where}: {name} must be text or messages with role and content, got {messages!r}.")
        for message in () if isinstance(messages, str) else messages:
            _check_message(message, f"{where}: {name}")
    ids = triplet.get("completion_ids")
    if ids is not None and not _are_token_ids(ids):
        raise ValueError(f"{where}: completion_ids must be a list of token ids or null, got {ids!r:.100}.")
    for name in SCORES:
        score = triplet.get(name)
        if score is not None and not (
            isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 100
        ):
            raise ValueError(f"{where}: {name} must be 0-100 or null, got {score!r}.")


def _are_token_ids(ids: Any) -> bool:
    try:
        return not isinstance(ids, str | Mapping) and all(0 <= index(token) < 2**31 for token in ids)
    except TypeError:
        return False


def _check_message(message: Message, where: str) -> None:
    if not isinstance(message["role"], str):
        raise ValueError(f"{where}: a message's role must be text, got {message['role']!r}.")
    if message["content"] is None and message.get("tool_calls"):
        return
    try:
        content_text(message)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
