"""Triplets by trait, as `psr train` takes them: from a run of `psr triplets` or from JSONL files, some held out."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_psr.chat_template import template_args_of
from peft_psr.text import composed

from .draws import template_hash
from .run import NEGATIVES, STATE, TRIPLETS
from .triplets import Triplet, read_triplets


Traits = dict[str, list[Triplet]]


def read_traits(source: str | Path, names: Sequence[str] = ()) -> Traits:
    """Reads triplets and sorts them by trait, in the order in which traits first occur.

    A triplet's trait is its field `trait`, which `psr triplets` writes; without one, the name of its file.

    Args:
        source: The folder of a finished run of `psr triplets`, a JSONL file, or a folder of JSONL files.
        names: The traits that are wanted; none for all.

    Raises:
        FileNotFoundError: there is nothing of that name, or no JSONL in it.
        ValueError: the run is not finished, a line is no triplet, a trait is not there, or two traits would share a
            folder.
    """
    known: Traits = {}
    for path in _files(Path(source)):
        for triplet in read_triplets(path):
            trait = triplet.get("trait")
            known.setdefault(path.stem if trait is None else str(trait), []).append(triplet)
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"traits: {source} has no {', '.join(map(repr, missing))}; there are: {', '.join(sorted(known))}."
        )
    chosen = {name: known[name] for name in names or known}
    folders: dict[str, str] = {}
    for name in chosen:
        other = folders.setdefault(folder_name(name), name)
        if other != name:
            raise ValueError(f"traits: {other!r} and {name!r} would share the folder {folder_name(name)}; rename one.")
    return chosen


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"triplets: there is no file or folder {str(source)!r}. Make one with `psr triplets`.")
    if (source / TRIPLETS).is_file():
        return [source / TRIPLETS]
    if (source / STATE).is_file():
        raise ValueError(f"triplets: the run in {source} is not finished; the same `psr triplets` command goes on.")
    files = sorted(path for path in source.glob("*.jsonl") if path.name != NEGATIVES)
    if not files:
        raise FileNotFoundError(f"triplets: {source} holds no {TRIPLETS} and no other JSONL file.")
    return files


def folder_name(trait: str) -> str:
    """A trait's name as that of a folder and of an adapter: letters, digits, - and _."""
    return re.sub(r"[^\w-]+", "_", composed(trait)) or "_"


def hold_out(triplets: Sequence[Triplet], share: float, seed: int, trait: str) -> tuple[list[Triplet], list[Triplet]]:
    """Splits triplets by their bare prompt, so that no prompt is on both sides.

    Args:
        triplets: Of one trait.
        share: Of the prompts, 0-1; above 0 at least one prompt is held out.
        seed: Same seed, same prompts.
        trait: Whose they are.

    Returns:
        Those to train on and those held out, in the order in which they came.

    Raises:
        ValueError: one side would be empty.
    """
    if not share:
        return list(triplets), []
    keys = [json.dumps(triplet["prompt"], sort_keys=True) for triplet in triplets]
    prompts = list(dict.fromkeys(keys))
    count = max(1, round(share * len(prompts)))
    if count == len(prompts):
        raise ValueError(
            f"eval_share: {trait!r} has {len(prompts)} prompt(s), and {share:g} of them held out would leave none to "
            "train on. Set eval_share: 0, or draw on more questions."
        )
    held_out = set(random.Random(f"{seed}/{trait}").sample(prompts, count))
    sides: tuple[list[Triplet], list[Triplet]] = ([], [])
    for key, triplet in zip(keys, triplets, strict=True):
        sides[key in held_out].append(triplet)
    return sides


def check_origin(traits: Mapping[str, Sequence[Mapping[str, Any]]], model: str, name: str | None, tokenizer) -> None:
    """Checks that triplets were drawn from the model that they are to train, as far as they say.

    Args:
        traits: {trait: triplets}.
        model: The base model.
        name: What the triplets call it, if something else.
        tokenizer: The base model's.

    Raises:
        ValueError: they name another model, or another chat template.
    """
    template, args = template_hash(tokenizer.chat_template), template_args_of(tokenizer)
    for trait, triplets in traits.items():
        for triplet in triplets:
            drawn_from, drawn_with = triplet.get("model"), triplet.get("template_hash")
            if drawn_from is not None and drawn_from != name and not _same(drawn_from, model):
                raise ValueError(
                    f"triplets: those of {trait!r} were drawn from {drawn_from!r}, and an adapter is trained on the "
                    f"model's own completions, here {model!r}. Train --model {drawn_from}, or draw triplets from "
                    f"{model}, or, if both names mean one model, say --triplets-model {drawn_from}."
                )
            drawn_args = triplet.get("template_args", args) or {}
            if drawn_args != args:
                raise ValueError(
                    f"triplets: those of {trait!r} were drawn with other arguments of the chat template "
                    f"({json.dumps(drawn_args)}) than here ({json.dumps(args)}), so on other prompts. Train with "
                    f"--template-args '{json.dumps(drawn_args)}', or draw them again."
                )
            if drawn_with is not None and drawn_with != template:
                raise ValueError(
                    f"triplets: those of {trait!r} were drawn with another chat template ({drawn_with}) than "
                    f"{model} has ({template}). Name the revision that they were drawn from with --revision, or draw "
                    "them again."
                )


def _same(first: str, second: str) -> bool:
    if first == second:
        return True
    return os.path.isdir(first) and os.path.isdir(second) and os.path.samefile(first, second)
