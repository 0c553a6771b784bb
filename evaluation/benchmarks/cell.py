"""A cell of a benchmark's matrix: one model, trait, method and seed, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_psr.evaluation.methods.method import PLAIN, PROMPT


Result = dict[str, Any]
"""What was measured of a cell, as JSON."""


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
