"""Triplets by trait, as `psr train` takes them: from a run of `psr triplets` or from JSONL files, some held out."""

import json
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_psr.prompts.chat_template import template_args_of
from peft_psr.text import composed

from .collator import TripletCollator
from .context import row_length, too_long
from .dataset import Row
from .draws import template_hash
from .filtering import TOO_LONG, UNFIT
from .triplets import NEGATIVES, STATE, TRIPLETS, Triplet, check_scale, scan_triplets


Traits = dict[str, list[Triplet]]

NO_TRIPLET = "no triplet"
"""Why `psr train` leaves a line out; `UNFIT` and `TOO_LONG` are why it leaves a triplet out."""
FIRST = 3
"""How many of those that are left out are named."""


@dataclass(frozen=True)
class LeftOut:
    """A triplet that can't be used."""

    trait: str | None  # whose it is; `None` for a line of a file with several traits that can't be read
    where: str  # its place: file and line, and which of its trait's triplets
    kind: str  # what is wrong: `NO_TRIPLET`, `UNFIT` or `TOO_LONG`
    reason: str  # the same in a sentence, with `where` in it


@dataclass(frozen=True)
class TraitFiles:
    """What was read."""

    traits: Traits  # {trait: triplets}
    places: dict[str, list[str]]  # {trait: file and line of each triplet}
    left_out: dict[str, list[LeftOut]]  # {trait: lines that are no triplets, of the files that hold the trait}


def read_traits(source: str | Path, names: Sequence[str] = ()) -> Traits:
    """Reads triplets and sorts them by trait, in the order in which traits first occur.

    A triplet's trait is its field `trait`, which `psr triplets` writes; without one, the name of its file; either in
    Unicode's composed form (NFC).

    Args:
        source: The folder of a finished run of `psr triplets`, a JSONL file, or a folder of JSONL files.
        names: The traits that are wanted; none for all.

    Raises:
        FileNotFoundError: there is nothing of that name, or no JSONL in it.
        ValueError: the run is not finished, a line is no triplet, a trait is not there, or two would share a folder.
    """
    found = scan_traits(source, names)
    for left_out in found.left_out.values():
        for line in left_out:
            raise ValueError(line.reason)
    return found.traits


def scan_traits(source: str | Path, names: Sequence[str] = ()) -> TraitFiles:
    """As `read_traits`, but lines that are no triplets are told apart from those that are.

    Raises:
        FileNotFoundError: as `read_traits`.
        ValueError: as `read_traits`, but for lines that are no triplets; or a file holds nothing else, or, where
            nobody can tell whose they are, more of these.
    """
    known: Traits = {}
    places: dict[str, list[str]] = {}
    bad: dict[str, list[LeftOut]] = {}
    for path in _files(Path(source)):
        of_file: dict[str, list[Triplet]] = {}
        wrong: list[tuple[str, ValueError]] = []
        for number, found in scan_triplets(path):
            where = f"{path.name}, line {number}"
            if isinstance(found, ValueError):
                wrong.append((where, found))
                continue
            trait = found.get("trait")
            name = composed(path.stem if trait is None else str(trait))
            of_file.setdefault(name, []).append(found)
            places.setdefault(name, []).append(where)
        good = [triplet for triplets in of_file.values() for triplet in triplets]
        if not good:
            why = f" {wrong[0][1]}" if wrong else " Write some with `psr triplets`."
            raise ValueError(f"{path} holds no triplets that can be used.{why}")
        check_scale(good, str(path))
        if len(of_file) > 1 and len(wrong) > len(good):
            raise ValueError(f"{path}: {len(wrong)} of {len(wrong) + len(good)} lines can't be used. {wrong[0][1]}")
        owner = next(iter(of_file)) if len(of_file) == 1 else None
        for name, triplets in of_file.items():
            known.setdefault(name, []).extend(triplets)
            bad.setdefault(name, []).extend(LeftOut(owner, where, NO_TRIPLET, str(error)) for where, error in wrong)
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
    return TraitFiles(chosen, {name: places[name] for name in chosen}, {name: bad[name] for name in chosen})


def usable(
    trait: str, triplets: Sequence[Triplet], places: Sequence[str], collator: TripletCollator, limit: int | None
) -> tuple[dict[int, Row], list[LeftOut]]:
    """Tokenises the triplets of a trait that can be trained on, and says what is wrong with the others.

    `places` are file and line of each, `limit` the model's positions.

    Returns:
        {a triplet's place: what `collator.encode` made of it} and those that are left out.
    """
    fine: dict[int, Row] = {}
    left_out: list[LeftOut] = []
    for i, (triplet, place) in enumerate(zip(triplets, places, strict=True)):
        where = f"{trait}[{i}] ({place})"
        try:
            row = collator.encode(triplet, where)
        except ValueError as error:
            left_out.append(LeftOut(trait, where, UNFIT, str(error)))
        except (TypeError, OverflowError) as error:  # a tokenizer's or a template's
            left_out.append(LeftOut(trait, where, UNFIT, f"{where}: {error}"))
        else:
            if limit is not None and row_length(row) > limit:
                reason = f"{where} has {too_long(row_length(row), limit)}."
                left_out.append(LeftOut(trait, where, TOO_LONG, reason))
            else:
                fine[i] = row
    return fine, left_out


def check_share(trait: str, kept: int, left_out: Sequence[LeftOut]) -> None:
    """Raise `ValueError` if nothing of a trait is left, or less than was left out: then it is not a line or two.

    Lines that may be another trait's don't count.
    """
    own = [line for line in left_out if line.trait is not None]
    if not kept or len(own) > kept:
        raise ValueError(f"triplets: {len(own)} of {kept + len(own)} of {trait!r} can't be used. {in_words(own)}")


def in_words(left_out: Sequence[LeftOut]) -> str:
    """How many were left out and why, and the first of them."""
    counts = Counter(line.kind for line in left_out)
    kinds = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
    return f"{kinds}. " + " ".join(line.reason.rstrip(".") + "." for line in left_out[:FIRST])


def as_json(left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """The same for a file: `count`, `why` with the count of each kind, and the `first` of them."""
    why = dict(Counter(line.kind for line in left_out))
    return {"count": len(left_out), "why": why, "first": [line.reason for line in left_out[:FIRST]]}


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
    """Splits a trait's triplets by their bare prompt, so that none is on both sides: to train on, held out.

    `share` is of the prompts, 0-1; above 0 at least one is held out. Same seed, same prompts; triplets stay in order.

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


def check_origin(
    traits: Mapping[str, Sequence[Mapping[str, Any]]], model: str, name: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises `ValueError` if {trait: triplets} say they are drawn from another model, or with another chat template.

    `name` is what they call the base model, `model`, if something else.
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


def drawn_template_args(traits: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    """The arguments of the chat template that triplets were drawn with; `None` if they do not say.

    Raises `ValueError` if they were drawn with different ones.
    """
    said = {
        json.dumps(triplet["template_args"] or {}, sort_keys=True)
        for triplets in traits.values()
        for triplet in triplets
        if "template_args" in triplet
    }
    if len(said) > 1:
        raise ValueError(
            f"triplets: they were drawn with different arguments of the chat template ({', '.join(sorted(said))}), "
            "so on different prompts. Give those of one kind."
        )
    return json.loads(said.pop()) if said else None


def _same(first: str, second: str) -> bool:
    return first == second or os.path.isdir(first) and os.path.isdir(second) and os.path.samefile(first, second)
