"""The benchmarks by name: what each takes, checks beforehand, and does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .axbench_benchmark import AxBenchRecipe, check_axbench, run_axbench
from .faithfulness_benchmark import FaithfulnessRecipe, check_faithfulness, run_faithfulness
from .ifeval_benchmark import IFEvalRecipe, check_ifeval, run_ifeval
from .persona_benchmark import PersonaRecipe, check_persona, run_persona
from .recipe import EvaluateRecipe, shipped_evaluate_recipes
from .report import Report
from .side_effects_benchmark import SideEffectsRecipe, check_side_effects, run_side_effects
from .workbench import Workbench


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: As the command has it.
        summary: One line of what it measures.
        recipe: Its recipe's class.
        check: Raises what can be known to be wrong before any long work.
        run: Measures.
    """

    name: str
    summary: str
    recipe: type[EvaluateRecipe]
    check: Callable[[Workbench], None]
    run: Callable[[Workbench], Report]


BENCHMARKS = (
    Benchmark(
        "persona",
        "Trait and coherence on held-out questions, at alpha 1 and at coherence 80 or the prompt's.",
        PersonaRecipe, check_persona, run_persona,
    ),
    Benchmark(
        "ifeval",
        "Whether IFEval's instructions are followed without standing in the prompt.",
        IFEvalRecipe, check_ifeval, run_ifeval,
    ),
    Benchmark(
        "axbench",
        "Concepts brought into answers: three ratings 0-2, the factor chosen on half of the instructions.",
        AxBenchRecipe, check_axbench, run_axbench,
    ),
    Benchmark(
        "faithfulness",
        "How near methods come to the prompt, with a reworded and a neutral instruction beside them.",
        FaithfulnessRecipe, check_faithfulness, run_faithfulness,
    ),
    Benchmark(
        "side-effects",
        "What changes besides the trait: neutral prompts and texts, refusals, injections, capability.",
        SideEffectsRecipe, check_side_effects, run_side_effects,
    ),
)  # fmt: skip
"""In the order of the command's help."""


def shipped_by_benchmark() -> dict[str, dict[str, Path]]:
    """{benchmark: {recipe: file}} of the recipes that ship; a recipe's name begins with its benchmark's."""
    return {
        benchmark.name: {
            name: path for name, path in shipped_evaluate_recipes().items() if name.startswith(f"{benchmark.name}-")
        }
        for benchmark in BENCHMARKS
    }
