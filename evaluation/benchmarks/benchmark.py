"""What a benchmark is: a recipe's class, what is checked before any long work, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from peft_psr.registry import loaded

from .recipe import EvaluateRecipe


if TYPE_CHECKING:
    from peft_psr.evaluation.reports.report import Report

    from .workbench import Workbench


Recipe = TypeVar("Recipe", bound=EvaluateRecipe)


@dataclass(frozen=True)
class Benchmark(Generic[Recipe]):
    """One benchmark. Its functions may be given as "module:function", so that its name and recipe load nothing.

    Attributes:
        name: As the command has it.
        summary: One line of what it measures.
        recipe: Its recipe's class.
        checker: Raises what can be known to be wrong before any long work.
        runner: Measures.
    """

    name: str
    summary: str
    recipe: type[Recipe]
    checker: Callable[[Workbench[Recipe]], None] | str
    runner: Callable[[Workbench[Recipe]], Report] | str

    def check(self, bench: Workbench[Recipe]) -> None:
        """Raises what can be known to be wrong before any long work; writes nothing."""
        loaded(self.checker)(bench)

    def run(self, bench: Workbench[Recipe]) -> Report:
        """Measures what is not measured yet, inside `with bench.open():`."""
        return loaded(self.runner)(bench)
