"""Which instructions a concept is tried on: drawn by seed, half of them to choose the factor and half to score.

AxBench takes them from AlpacaEval (arXiv 2501.17148). By default ours are questions of the data set's shared
negatives, of the concept's own genre, that no adapter of the concept is trained on.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_psr.files import check_file, digest
from peft_psr.text import check_unicode, parse_json, read_text, text_lines
from peft_psr.training.sources.axbench import Concept, Question


@dataclass(frozen=True)
class Trial:
    """A concept, instructions on which its factor is chosen, and others to score the answers at that factor on."""

    concept: Concept
    choosing: tuple[str, ...]
    scoring: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that stand for the instructions."""
        return digest([self.choosing, self.scoring], 16)


def read_instructions(path: str | Path) -> list[Question]:
    """Reads instructions, each once, in order: JSON as AlpacaEval has it or a list of texts, JSONL, or lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file; the message names the place.
    """
    path = Path(path)
    check_file(path, "questions_data")
    entries: list[tuple[str, object]]
    if path.suffix == ".json":
        content = parse_json(read_text(path), str(path))
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of instructions, got {type(content).__name__}.")
        entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(content)]
    else:
        lines = [(f"{path}, line {number}", line) for number, line in text_lines(path)]
        entries = [(where, parse_json(line, where) if path.suffix == ".jsonl" else line) for where, line in lines]
    found: dict[str, Question] = {}
    for where, entry in entries:
        asked = entry.get("instruction") if isinstance(entry, dict) else entry
        if not isinstance(asked, str) or not asked.strip():
            raise ValueError(f"{where} must be a text or an object with `instruction`, got {str(entry)[:100]!r}.")
        found.setdefault(asked.strip(), Question(check_unicode(asked, where).strip()))
    return list(found.values())


def make_trial(concept: Concept, questions: Sequence[Question], count: int, seed: int) -> Trial:
    """Draws a concept's `count` instructions, the same for the same questions, seed and concept's number.

    The first half, rounded down, is to choose the factor. Those that the concept's own examples answer are left out,
    and those of another genre where both sides name one. `ValueError` if there are not so many.
    """
    trained = {text.strip() for text in concept.inputs}
    fitting = [
        question.text
        for question in questions
        if question.text not in trained
        and (question.genre is None or not concept.genres or question.genre in concept.genres)
    ]
    if len(fitting) < count:
        raise ValueError(
            f"Concept {concept.id} is to be tried on {count} instructions, and only {len(fitting)} of "
            f"{len(questions)} fit it: those of its genre ({', '.join(concept.genres) or 'any'}) that it is not "
            "trained on. Ask for fewer, or name a file of instructions as questions_data."
        )
    drawn = random.Random(f"{seed}/axbench/{concept.id}").sample(fitting, count)
    return Trial(concept, tuple(drawn[: count // 2]), tuple(drawn[count // 2 :]))
