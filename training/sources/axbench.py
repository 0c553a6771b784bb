"""AxBench concepts: questions, an instruction that asks for a concept, and the data set's own answers that show it.

A folder of it holds `metadata.jsonl` (`concept_id`, `concept`, `concept_genres_map`) and a training parquet (`input`,
`output`, `category`, `concept_id`). Source: AxBench (arXiv 2501.17148) and its data sets CONCEPT10 and CONCEPT500.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_psr.text import check_unicode, parse_json, text_lines
from peft_psr.training.data.draws import PromptPair
from peft_psr.training.data.placement import Placement, add_instruction
from peft_psr.training.data.triplets import Triplet

from .base import Selection, Source


CONCEPT_INSTRUCTION = (
    "Answer the question, and let this run through your whole answer, whether or not it has to do with the question: "
    "{concept}"
)
"""In our own words; `{concept}` is the concept's description."""

_COLUMNS = ("input", "output", "category", "concept_id")


@dataclass(frozen=True)
class Concept:
    """A concept with the questions and answers that AxBench has for it."""

    id: int  # `concept_id`
    description: str  # what the concept is, in words
    genres: tuple[str, ...]  # of "text", "code" and "math"
    inputs: tuple[str, ...]  # questions
    outputs: tuple[str, ...]  # for each question an answer that shows the concept


@dataclass(frozen=True)
class Question:
    """A question that AxBench has for no concept in particular."""

    text: str  # what is asked
    genre: str | None = None  # "text", "code" or "math", or `None` where the file does not say


def read_axbench(folder: str | Path, concept_ids: Sequence[int] | None = None) -> list[Concept]:
    """Reads concepts with their positive examples, in the order of `concept_ids`.

    Args:
        folder: Holds, itself or in folders below, one parquet file with "train" in its name or its folder's name, and
            one file that ends in `metadata.jsonl` beside it.
        concept_ids: All by default.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: several files fit, one is malformed (the message names it), or a concept is unknown or has no
            example.
    """
    train = _train_file(folder)
    metadata = _only(list(train.parent.glob("*metadata.jsonl")), train.parent, "*metadata.jsonl")
    described = _read_metadata(metadata)
    ids = list(described) if concept_ids is None else list(concept_ids)
    unknown = [str(concept_id) for concept_id in ids if concept_id not in described]
    if unknown:
        raise ValueError(f"{metadata} has no concept {', '.join(unknown)}; it has {', '.join(map(str, described))}.")
    examples = _read_positives(train)
    without = [str(concept_id) for concept_id in ids if concept_id not in examples]
    if without:
        raise ValueError(f"{train} has no positive example of concept {', '.join(without)}.")
    return [
        Concept(i, *described[i], inputs=tuple(e[0] for e in examples[i]), outputs=tuple(e[1] for e in examples[i]))
        for i in ids
    ]


def read_negative_questions(folder: str | Path) -> list[Question]:
    """Reads the questions of the shared negatives (`concept_id` -1), each once, in the file's order.

    Their answers show no concept and no adapter is trained on them. Some of the questions, though, come again among
    the positive examples of a concept: leave `Concept.inputs` out of what is to be held out from training on it.
    `folder` and errors are as in `read_axbench`.
    """
    train = _train_file(folder)
    questions: dict[str, Question] = {}
    for number, row in enumerate(_read_rows(train)):
        if row["concept_id"] != -1 or row["category"] != "negative":
            continue
        text = _text(row, "input", f"{train}, row {number}")
        if not text:
            raise ValueError(f"{train}, row {number}: input must not be empty.")
        questions.setdefault(text, Question(text, row.get("concept_genre") or None))
    return list(questions.values())


def axbench_pairs(
    concept: Concept, placement: Placement = "system", instruction: str = CONCEPT_INSTRUCTION
) -> list[PromptPair]:
    """The prompts to draw on: every question of the concept, with the instruction that asks for the concept.

    The instruction has the placeholder `{concept}`; `ValueError` if not. For its placement see `add_instruction`.

    Returns:
        Pairs with ids such as `"axbench/3/17"` (concept/question), whose metadata holds `concept_id` and `question`.
    """
    if "{concept}" not in instruction:
        raise ValueError(f"instruction must hold the placeholder {{concept}}, got {instruction!r}.")
    asked = instruction.replace("{concept}", concept.description)
    pairs = []
    for index, question in enumerate(concept.inputs):
        prompt = [{"role": "user", "content": question}]
        pairs.append(
            PromptPair(
                id=f"axbench/{concept.id}/{index}",
                trait=concept.description,
                prompt=prompt,
                steered_prompt=add_instruction(prompt, asked, placement),
                metadata={"concept_id": concept.id, "question": question},
            )
        )
    return pairs


def axbench_triplets(
    concept: Concept, placement: Placement = "system", instruction: str = CONCEPT_INSTRUCTION
) -> list[Triplet]:
    """Triplets to train on without drawing: the data set's own answers as completions; see `axbench_pairs`.

    They have no scores (train with `alpha=1`), and count as truncated: the data set does not say which of them were
    cut at its token limit, so none gets an end of turn.
    """
    return [
        Triplet(prompt=pair.prompt, steered_prompt=pair.steered_prompt, completion=output, truncated=True)
        for pair, output in zip(axbench_pairs(concept, placement, instruction), concept.outputs, strict=True)
    ]


class AxBenchSource(Source):
    """The questions of AxBench's concepts, each with the instruction that asks for the concept."""

    needs_data = True
    one_instruction = True

    def pairs(self, wanted: Selection) -> list[PromptPair]:
        """As `Source.pairs`."""
        for name in wanted.traits:
            if not name.isdecimal():
                raise ValueError(f"traits: AxBench's concepts are known by their number, got {name!r}.")
        concepts = read_axbench(wanted.data or "", [int(name) for name in wanted.traits] or None)
        return [pair for concept in concepts for pair in axbench_pairs(concept, wanted.placement)[: wanted.questions]]

    def trait_name(self, pair: PromptPair) -> str:
        """The concept's number."""
        return str(pair.metadata["concept_id"])


SOURCE = AxBenchSource()


def _train_file(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {str(folder)!r}. Download an AxBench data set and name its folder.")
    trained = [path for path in folder.rglob("*.parquet") if "train" in path.name or "train" in path.parent.name]
    return _only(trained, folder, "*train*.parquet")


def _only(paths: list[Path], folder: Path, pattern: str) -> Path:
    if not paths:
        raise FileNotFoundError(f"{folder} holds no {pattern}.")
    if len(paths) > 1:
        found = ", ".join(str(path.relative_to(folder)) for path in sorted(paths))
        raise ValueError(f"{folder} holds several {pattern}: {found}. Name the folder of one.")
    return paths[0]


def _read_metadata(path: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
    """{concept id: (description, genres)}."""
    described = {}
    for number, line in text_lines(path):
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        try:
            concept_id, concept = row["concept_id"], row["concept"]
            genres = row.get("concept_genres_map", {}).get(concept, [])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} must be an object with concept_id and concept, got {line[:100]!r}.") from error
        if not isinstance(concept_id, int) or not isinstance(concept, str) or not concept.strip():
            raise ValueError(f"{where}: concept_id must be a whole number and concept text, got {line[:100]!r}.")
        if not isinstance(genres, list) or not all(isinstance(genre, str) for genre in genres):
            raise ValueError(f"{where}: concept_genres_map must give a list of texts for the concept, got {genres!r}.")
        if concept_id in described:
            raise ValueError(f"{where}: concept_id {concept_id} comes twice.")
        described[concept_id] = (check_unicode(concept, where).strip(), tuple(genres))
    if not described:
        raise ValueError(f"{path} holds no concepts.")
    return described


def _read_positives(path: Path) -> dict[int, list[tuple[str, str]]]:
    """{concept id: [(input, output)]} of the rows whose category is "positive"."""
    examples: dict[int, list[tuple[str, str]]] = {}
    for number, row in enumerate(_read_rows(path)):
        if row["category"] != "positive":
            continue
        texts = (_text(row, "input", f"{path}, row {number}"), _text(row, "output", f"{path}, row {number}"))
        if not all(texts):
            raise ValueError(f"{path}, row {number}: input and output must not be empty, got {texts!r}.")
        examples.setdefault(row["concept_id"], []).append(texts)
    return examples


def _text(row: dict[str, Any], name: str, where: str) -> str:
    """A cell's text; empty where there is none."""
    if not isinstance(row[name] or "", str):
        raise ValueError(f"{where}: {name} must be text, got {row[name]!r}.")
    return (row[name] or "").strip()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with `_COLUMNS`, and `concept_genre` where the file has it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet needs pyarrow. Install it with `pip install "peft-psr[train]"`.') from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(table.column_names)}.")
    genre = [name for name in ("concept_genre",) if name in table.column_names]
    return table.select([*_COLUMNS, *genre]).to_pylist()
