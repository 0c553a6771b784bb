"""A first draft of a trait's files by a chat model, in the layout of `traits`; its user reads it over before use."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_psr.base_model import loading
from peft_psr.files import check_folder, write_json
from peft_psr.prompts.messages import Message
from peft_psr.training.data.draws import Draw, Failure, Sampler
from peft_psr.training.judges.prompts import TRAIT_PROMPT
from peft_psr.training.sampling.chat_server import ChatServer
from peft_psr.training.sampling.local import LocalSampler
from peft_psr.training.sampling.server import ServerSampler
from peft_psr.training.sources.base import Split
from peft_psr.training.sources.personas import SPLIT_FOLDERS, Trait, check_disjoint, parse_trait


Chat = Callable[[Sequence[Message]], str]
"""Anything that answers a conversation with text."""

NUM_INSTRUCTIONS = 5
NUM_QUESTIONS = 20
NOTE = "Drafted by a language model. Read it over, correct it, then remove this note."
"""What a drafted file says of itself, in the field `note`."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")

_REQUEST = """\
I am preparing material to study how a chat model shows the trait "{name}": {description}

Write a JSON object with exactly these fields:
- "instruction": a list of {instructions} objects {{"pos": ..., "neg": ...}}. "pos" is an instruction to the model, \
one or two sentences in the second person, that makes every answer show the trait strongly; "neg" is its counterpart \
that asks for the opposite. The {instructions} pairs must differ in wording and in angle.
- "questions": a list of {questions} things a user might say to the model, each one or two sentences, all different, \
from many areas of life, such that an answer can show the trait or not. They must not mention the trait.
- "rubric": two to four sentences for a judge: what counts as the trait, what looks like it but does not count, and \
what answers would get about 0, 50 and 100 of 100.

Reply with the JSON object alone."""

_RETRY = "That can't be used: {error} Reply with the whole JSON object again, corrected, and nothing else."


def draft_trait(name: str, description: str, chat: Chat, folder: str | Path, attempts: int = 3) -> dict[Split, Path]:
    """Asks a chat model for a trait and writes the file of each split, with a note that it is to be read over.

    Args:
        name: The trait's name, which becomes the files' name: small letters, digits, - and _.
        description: What the trait is, in a sentence or two.
        chat: Called with a conversation, returns the answer.
        folder: Where `trait_data_extract/` and `trait_data_eval/` are; made if need be. `read_trait` reads it.
        attempts: How often to ask; an answer that can't be used is sent back with what is wrong.

    Raises:
        FileExistsError: there is a trait of that name in the folder.
        NotADirectoryError: `folder` is a file.
        ValueError: a malformed name, an empty description, `attempts` below 1, or no usable answer; the message holds
            what was wrong with the last one and how it began.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name must be small letters, digits, - and _, for it names files, got {name!r}.")
    if not description.strip():
        raise ValueError(f"description must say in a sentence what the trait {name!r} is, got an empty one.")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}.")
    check_folder(folder)
    paths = {split: Path(folder) / part / f"{name}.json" for split, part in SPLIT_FOLDERS.items()}
    for path in paths.values():
        if path.exists():
            raise FileExistsError(f"{path} exists; a draft would replace it. Move it away, or choose another name.")
    drafted = _ask(name, description.strip(), chat, attempts)
    for split, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, drafted[split])
    return paths


def make_chat(
    model: str, server_url: str | None, key_variable: str, max_new_tokens: int, temperature: float, seed: int
) -> Chat:
    """Returns what answers a conversation with text of at most `max_new_tokens`: a model here, or at `server_url`.

    The server's key is in the environment variable `key_variable`. What is returned raises `ConnectionError` if there
    is
    no answer.

    Raises:
        OSError, ValueError: the model can't be had; a setting is wrong.
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


def _ask(name: str, description: str, chat: Chat, attempts: int) -> dict[Split, dict[str, Any]]:
    request = _REQUEST.format(
        name=name, description=description, instructions=NUM_INSTRUCTIONS, questions=2 * NUM_QUESTIONS
    )
    messages: list[Message] = [{"role": "user", "content": request}]
    mistake, answer = ValueError(), ""
    for _ in range(attempts):
        answer = chat(messages)
        try:
            return _files_from(answer, name)
        except ValueError as error:
            mistake = error
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": _RETRY.format(error=error)},
            ]
    raise ValueError(
        f"No usable draft of {name!r} in {attempts} attempts. The last one: {mistake} It began: {answer[:200]!r}. Try "
        "again, or a larger model."
    ) from mistake


def _files_from(answer: str, name: str) -> dict[Split, dict[str, Any]]:
    """The JSON of both splits."""
    draft = _json_object(answer)
    rubric = draft.get("rubric")
    if not isinstance(rubric, str) or not rubric.strip() or "{" in rubric:
        raise ValueError(f"rubric must be text without braces, got {rubric!r}.")
    for field, least, what in (("questions", 2 * NUM_QUESTIONS, ""), ("instruction", NUM_INSTRUCTIONS, " pairs")):
        count = len(draft[field]) if isinstance(draft.get(field), list) else 0
        if count < least:
            raise ValueError(f"{field} must be a list of {least}{what}, got {count}.")
    questions, pairs = draft["questions"], draft["instruction"]
    # alternate questions, so that neither split gets only what a model thinks of last
    halves: dict[Split, list[Any]] = {"train": questions[0::2], "test": questions[1::2]}
    files: dict[Split, dict[str, Any]] = {}
    traits: dict[Split, Trait] = {}
    for split, half in halves.items():
        files[split] = {
            "note": NOTE,
            "instruction": pairs[:NUM_INSTRUCTIONS],
            "questions": half[:NUM_QUESTIONS],
            "eval_prompt": TRAIT_PROMPT.replace("{trait}", f"{name}. {rubric.strip()}"),
        }
        traits[split] = parse_trait(files[split], name, split, f"the {split} half")
    check_disjoint(traits["train"], traits["test"], "questions")
    return files


def _json_object(answer: str) -> dict[str, Any]:
    """The object in an answer, which may stand in a code fence or between other text."""
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise ValueError("there is no JSON object in it.")
    try:
        return json.loads(answer[start : end + 1])
    except ValueError as error:
        raise ValueError(f"the JSON is malformed: {error}.") from error
