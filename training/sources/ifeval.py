"""IFEval prompts with and without their instruction."""

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft_psr.text import check_unicode, parse_json, text_lines
from peft_psr.training.data.draws import PromptPair

from .base import Selection, Source


logger = logging.getLogger(__name__)


def read_ifeval(path: str | Path, instruction_ids: Collection[str] | None = None) -> list[PromptPair]:
    """Reads IFEval prompts that come with a copy without the instruction.

    Args:
        path: JSONL with `prompt`, `prompt_without_instruction`, `instruction_id_list` and `kwargs` on each line; or a
            folder of such files, read by name.
        instruction_ids: Keep the prompts with these instructions, or with these traits, only; all by default.

    Returns:
        Pairs whose steered prompt is `prompt` and whose prompt is `prompt_without_instruction`, both one user turn.
        `trait` is the instruction id (several are joined by " + "), `id` is `<trait>/<key>/<occurrence of the key>`,
        `metadata` holds `instruction_id_list`, `kwargs` and `key`.

    Raises:
        FileNotFoundError: no such file or folder, or no `.jsonl` in it.
        ValueError: a line is malformed (the message names line and field), or none has the instructions asked for.
    """
    files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].exists():
        raise FileNotFoundError(
            f"IFEval's prompts are not at {str(path)!r}: give their JSONL file or a folder of them."
        )
    pairs = []
    occurrences: Counter[tuple[str, str]] = Counter()
    found = set()
    for file in files:
        for number, line in text_lines(file):
            row = _checked_row(line, f"{file}, line {number}")
            trait, key = " + ".join(row["instruction_id_list"]), str(row.get("key", number))
            found.add(trait)
            occurrence = occurrences[trait, key]
            occurrences[trait, key] += 1
            if instruction_ids is not None and trait not in instruction_ids:
                if not set(row["instruction_id_list"]) <= set(instruction_ids):
                    continue
            pairs.append(
                PromptPair(
                    id=f"{trait}/{key}/{occurrence}",
                    trait=trait,
                    prompt=[{"role": "user", "content": row["prompt_without_instruction"]}],
                    steered_prompt=[{"role": "user", "content": row["prompt"]}],
                    metadata={name: row[name] for name in ("instruction_id_list", "kwargs")} | {"key": key},
                )
            )
    if not pairs:
        asked = "" if instruction_ids is None else f" with {', '.join(sorted(instruction_ids))}"
        raise ValueError(f"{path} holds no prompts{asked}. Its instructions: {', '.join(sorted(found)) or 'none'}.")
    return pairs


class IFEvalSource(Source):
    """IFEval's prompts, whose instruction is part of their text."""

    needs_data = True
    takes_instruction = False
    judge = "ifeval"

    def pairs(self, wanted: Selection) -> list[PromptPair]:
        """As `Source.pairs`, without the prompts that are the same without their instruction."""
        seen: Counter[str] = Counter()
        pairs = []
        for pair in read_ifeval(wanted.data or "", wanted.traits or None):
            if pair.prompt == pair.steered_prompt:  # the published files have a few
                logger.warning("%s is left out: its prompt is the same without the instruction.", pair.id)
                continue
            seen[pair.trait] += 1
            if wanted.questions is None or seen[pair.trait] <= wanted.questions:
                pairs.append(pair)
        return pairs


SOURCE = IFEvalSource()


def _checked_row(line: str, where: str) -> dict[str, Any]:
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an IFEval prompt is an object, got {type(row).__name__}.")
    for name in ("prompt", "prompt_without_instruction"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where}: {name} must be text that is not empty, got {row.get(name)!r}.")
        check_unicode(row[name], f"{where}: {name}")
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"{where}: instruction_id_list must be a list of instruction ids, got {ids!r}.")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(k, dict) for k in kwargs):
        raise ValueError(f"{where}: kwargs must be a list of {len(ids)} objects, one an instruction, got {kwargs!r}.")
    return row
