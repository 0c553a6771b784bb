"""Traits in the Persona Vectors layout: instructions that ask for a trait, questions that can show it, a judge prompt.

A trait is two JSON files of one name, `trait_data_extract/<trait>.json` to train on and `trait_data_eval/<trait>.json`
to test on, each with `instruction` (`{"pos", "neg"}` pairs), `questions` and `eval_prompt` (with `{question}` and
`{answer}`). Source: Persona Vectors (arXiv 2507.21509) and its repository.
"""

import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

from peft_psr.text import check_unicode, composed, parse_json, read_text
from peft_psr.training.data.draws import PromptPair
from peft_psr.training.data.placement import Placement, add_instruction

from .base import Selection, Source, Split


SPLIT_FOLDERS: dict[Split, str] = {"train": "trait_data_extract", "test": "trait_data_eval"}
"""The folder of each split."""
EVAL_PLACEHOLDERS = ("{question}", "{answer}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class InstructionPair(NamedTuple):
    """An instruction that asks for the trait, and one that asks for its opposite."""

    pos: str
    neg: str


@dataclass(frozen=True)
class Trait:
    """One split of a trait."""

    name: str  # the file's name without `.json`, in Unicode's composed form (NFC)
    split: Split  # "train" or "test"
    instructions: tuple[InstructionPair, ...]  # pairs of instructions, all different in wording
    questions: tuple[str, ...]  # what the model is asked; no two alike, and none that the other split has too
    eval_prompt: str  # Asks a judge for the trait's score, 0-100; placeholders `{question}` and `{answer}`


def list_traits(source: str | Path | None = None, revision: str | None = None) -> list[str]:
    """Names of the traits in a source, as `read_trait` takes it; of those that ship with the package by default.

    Raises `FileNotFoundError` if the source is not there, `ValueError` if it holds no trait.
    """
    return sorted(_files(_shipped_folder() if source is None else source, revision))


def read_trait(
    source: str | Path, split: Split = "train", name: str | None = None, revision: str | None = None
) -> Trait:
    """Reads and checks one split of a trait.

    Args:
        source: The name of a trait that ships, a file, a folder that holds `trait_data_extract/` and
            `trait_data_eval/` (or holds a folder that does), or a Hub data set `owner/name` with that layout. A file
            outside these folders has training questions only. A folder that is named like a trait that ships is
            written `./formal`.
        split: "train" or "test".
        name: Which trait, where the source has several.
        revision: Branch, tag or commit of a Hub data set.

    Raises:
        FileNotFoundError: the source, or its file for `split`, is not there.
        ValueError: `split` is unknown, `name` is missing or unknown, a file is malformed (the message names file and
            field), or both splits share a question.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be one of {', '.join(map(repr, get_args(Split)))}, got {split!r}.")
    name = None if name is None else composed(name)
    ships = composed(source) if isinstance(source, str) else ""
    if ships in list_traits() and name in (None, ships):
        source, name = _shipped_folder(), ships
    found = _files(source, revision)
    if name is None and len(found) > 1:
        raise ValueError(f"{source} holds several traits: {', '.join(sorted(found))}. Give the name of one.")
    name = next(iter(found)) if name is None else name
    if name not in found:
        raise ValueError(f"{source} holds no trait {name!r}; there are: {', '.join(sorted(found))}.")
    files = found[name]
    if split not in files:
        raise FileNotFoundError(
            f"The trait {name!r} has no {split} questions: {source} lacks {SPLIT_FOLDERS[split]}/{name}.json. Put "
            f"both splits side by side, in {' and '.join(SPLIT_FOLDERS.values())}."
        )
    traits = {
        part: parse_trait(parse_json(read_text(path), str(path)), name, part, str(path))
        for part, path in files.items()
    }
    if len(traits) > 1:
        check_disjoint(traits["train"], traits["test"], f"{files['test']}: questions")
    return traits[split]


def parse_trait(data: Any, name: str, split: Split, where: str) -> Trait:
    """Checks what a trait file holds, as JSON; other fields than the layout's are let pass.

    Raises `ValueError`, naming the file by `where` and the field, if one is missing or malformed.
    """
    if not isinstance(data, dict):
        raise ValueError(
            f"{where} must hold an object with instruction, questions and eval_prompt, got {type(data).__name__}."
        )
    instructions = []
    for index, pair in enumerate(_list(data, "instruction", where)):
        field = f"{where}: instruction[{index}]"
        if not isinstance(pair, dict):
            raise ValueError(f'{field} must be {{"pos": text, "neg": text}}, got {pair!r}.')
        instructions.append(
            InstructionPair(*(_text(pair.get(key), f"{field}.{key}") for key in InstructionPair._fields))
        )
    questions = [_text(q, f"{where}: questions[{i}]") for i, q in enumerate(_list(data, "questions", where))]
    seen: dict[str, int] = {}
    for index, question in enumerate(questions):
        first = seen.setdefault(_plain(question), index)
        if first != index:
            raise ValueError(
                f"{where}: questions[{index}] says the same as questions[{first}]: {question!r}. Drop one."
            )
    eval_prompt = _text(data.get("eval_prompt"), f"{where}: eval_prompt")
    missing = [placeholder for placeholder in EVAL_PLACEHOLDERS if placeholder not in eval_prompt]
    if missing:
        raise ValueError(f"{where}: eval_prompt lacks {' and '.join(missing)}, where the judge's material goes.")
    return Trait(name, split, tuple(instructions), tuple(questions), eval_prompt)


def check_disjoint(train: Trait, test: Trait, where: str) -> None:
    """Raises `ValueError`, naming `where`, if both splits ask the same question."""
    trained = {_plain(question) for question in train.questions}
    shared = [question for question in test.questions if _plain(question) in trained]
    if shared:
        raise ValueError(
            f"{where}: {len(shared)} of the test questions are training questions too, such as {shared[0]!r}. A trait "
            "is tested on questions it was not trained on: replace them."
        )


def trait_pairs(trait: Trait, placement: Placement = "system", negative: bool = False) -> list[PromptPair]:
    """The prompts to draw on: every instruction with every question.

    Args:
        trait: As read; `dataclasses.replace` takes fewer instructions or questions.
        placement: Where the instruction stands; see `add_instruction`, whose errors these are.
        negative: Take the instructions that ask for the opposite.

    Returns:
        Pairs with ids such as `"formal/2/17"` (trait/instruction/question; `"formal/negative/2/17"`), whose metadata
        holds `split`, `instruction`, `instruction_index`, `question` and `question_index`.
    """
    prefix = f"{trait.name}/negative" if negative else trait.name
    pairs = []
    for (i, instructions), (q, question) in product(enumerate(trait.instructions), enumerate(trait.questions)):
        instruction = instructions.neg if negative else instructions.pos
        prompt = [{"role": "user", "content": question}]
        pairs.append(
            PromptPair(
                id=f"{prefix}/{i}/{q}",
                trait=trait.name,
                prompt=prompt,
                steered_prompt=add_instruction(prompt, instruction, placement),
                negative=negative,
                metadata={
                    "split": trait.split,
                    "instruction": instruction,
                    "instruction_index": i,
                    "question": question,
                    "question_index": q,
                },
            )
        )
    return pairs


class PersonasSource(Source):
    """Trait files, those that ship or the user's: every instruction of a trait with every question of the split."""

    has_test_split = True
    has_negatives = True

    def pairs(self, wanted: Selection) -> list[PromptPair]:
        """As `Source.pairs`; pairs for the opposite follow a trait's own."""
        return [
            pair
            for trait in self._traits(wanted)
            for negative in ([False, True] if wanted.negatives else [False])
            for pair in trait_pairs(trait, wanted.placement, negative)
        ]

    def judge_prompts(self, wanted: Selection) -> dict[str, str]:
        """Each trait's `eval_prompt`."""
        return {trait.name: trait.eval_prompt for trait in self._traits(wanted)}

    def _traits(self, wanted: Selection) -> list[Trait]:
        where, revision = wanted.data, wanted.data_revision
        names = wanted.chosen(list_traits(where, revision), where or "source: personas")
        read = (read_trait(name if where is None else where, wanted.split, name, revision) for name in names)
        return [
            replace(
                trait,
                instructions=trait.instructions[: wanted.instructions],
                questions=trait.questions[: wanted.questions],
            )
            for trait in read
        ]


SOURCE = PersonasSource()


def _shipped_folder() -> Path:
    return Path(__file__).parent / "traits"


def _files(source: str | Path, revision: str | None) -> dict[str, dict[Split, Path]]:
    """The files of each trait by split, of whatever a source is."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".json":
            raise ValueError(f"A trait file is JSON and named <trait>.json, got {str(path)!r}.")
        if path.parent.name not in SPLIT_FOLDERS.values():
            return {composed(path.stem): {"train": path}}
        return {composed(path.stem): _layout(path.parent.parent)[composed(path.stem)]}
    if path.is_dir():
        folder = path.parent if path.name in SPLIT_FOLDERS.values() else path
    elif _HUB_ID.fullmatch(str(source)):
        folder = _download(str(source), revision)
    else:
        raise FileNotFoundError(
            f"No file or folder {str(source)!r}, no Hub data set (owner/name), and no trait of that name ships; those "
            f"that do: {', '.join(list_traits())}."
        )
    for candidate in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        if found := _layout(candidate):
            return found
    raise ValueError(f"{source} holds no traits; expected {' and '.join(SPLIT_FOLDERS.values())} with JSON files.")


def _layout(folder: Path) -> dict[str, dict[Split, Path]]:
    found: dict[str, dict[Split, Path]] = {}
    for split, name in SPLIT_FOLDERS.items():
        for path in sorted((folder / name).glob("*.json")):
            other = found.setdefault(composed(path.stem), {}).setdefault(split, path)
            if other != path:
                raise ValueError(f"{path} and {other.name!a} beside it are one name in two Unicode forms; rename one.")
    return found


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"*{folder}/*.json" for folder in SPLIT_FOLDERS.values()]
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"No folder {repo_id!r} here, and the Hub data set of that name can't be had: {error}"
        ) from error


def _list(data: dict[str, Any], field: str, where: str) -> list[Any]:
    value = data.get(field)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {field} must be a list with at least one entry, got {value!r}.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be text that is not empty, got {value!r}.")
    return check_unicode(value, where).strip()


def _plain(question: str) -> str:
    """What two wordings of one question share: letters and digits, in lower case."""
    return " ".join(re.findall(r"\w+", question.casefold()))
