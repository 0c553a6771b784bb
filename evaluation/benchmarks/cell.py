"""A cell of a benchmark's matrix: one model, trait, method and seed, and what was measured of it."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft_psr.evaluation.methods.method import PLAIN, PROMPT


Result = dict[str, Any]
"""What was measured of a cell, as JSON."""
Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


def grouped(pairs: Iterable[tuple[Key, Iterable[Item]]]) -> dict[Key, list[Item]]:
    """{key: the items of all its pairs}, in the order of the pairs."""
    groups: dict[Key, list[Item]] = {}
    for key, items in pairs:
        groups.setdefault(key, []).extend(items)
    return groups


@dataclass(frozen=True)
class Cell:
    """One place of the matrix.

    Attributes:
        model: The base model's name.
        trait: The trait or concept.
        method: A method's name, that of a given adapter, `PLAIN` or `PROMPT`.
        seed: Of adapter and answers; `None` where nothing is left to chance.
        more: What else it is of, as JSON: a strength, a fold.
        result: What was measured; empty until then.
    """

    model: str
    trait: str
    method: str
    seed: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_adapter(self) -> bool:
        """Whether it is neither the plain nor the prompted model."""
        return self.method not in (PLAIN, PROMPT)

    @property
    def parameters(self) -> dict[str, Any]:
        """All that it is of, as JSON; its result is kept under them."""
        named = {"model": self.model, "trait": self.trait, "method": self.method, "seed": self.seed}
        return {**{name: value for name, value in named.items() if value is not None}, **self.more}

    def as_json(self, *more: str) -> dict[str, Any]:
        """For `results.json`: what it is of, with some of `more` by name, and its result in one mapping."""
        named = {"model": self.model, "trait": self.trait, "method": self.method, "seed": self.seed}
        return {**named, **{name: self.more[name] for name in more}, **self.result}


def by(cells: Iterable[Cell], name: str) -> dict[Any, list[Cell]]:
    """{value of a cell's field, such as "method": its cells}, in order."""
    return grouped((getattr(cell, name), [cell]) for cell in cells)
