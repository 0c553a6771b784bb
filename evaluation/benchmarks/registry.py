"""The benchmarks by name: what each takes, checks beforehand, and does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from peft_psr.evaluation.benchmarks.axbench.benchmark import AxBenchRecipe, check_axbench, run_axbench
from peft_psr.evaluation.benchmarks.faithfulness.benchmark import (
    FaithfulnessRecipe,
    check_faithfulness,
    run_faithfulness,
)
from peft_psr.evaluation.benchmarks.ifeval.benchmark import IFEvalRecipe, check_ifeval, run_ifeval
from peft_psr.evaluation.benchmarks.persona.benchmark import PersonaRecipe, check_persona, run_persona
from peft_psr.evaluation.benchmarks.side_effects.benchmark import (
    SideEffectsRecipe,
    check_side_effects,
    run_side_effects,
)
from peft_psr.evaluation.reports.report import Report
from peft_psr.evaluation.reports.report_files import write_report

from .recipe import EvaluateRecipe, load_evaluate_recipe, shipped_evaluate_recipes
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


def run_benchmark(
    benchmark: Benchmark, recipe: EvaluateRecipe, output: str | Path, console: Console | None = None
) -> tuple[Report, list[Path]]:
    """Measures what is not measured yet, and writes the report into the folder.

    Args:
        benchmark: Which.
        recipe: Its recipe.
        output: A new folder, or one that a run of the same recipe has left.
        console: Where progress is shown.

    Returns:
        The report, and the files it was written to.

    Raises:
        BlockingIOError: another process is at work in the folder.
        OSError, ValueError: as `Workbench.check`, before any long work; or the disk is full, for one.
    """
    bench = Workbench(recipe, Path(output), benchmark.name, console)
    benchmark.check(bench)
    with bench.open():
        report = benchmark.run(bench)
        return report, write_report(bench.folder, report)


def evaluate_persona(output: str | Path, recipe: str | Path | None = None, **options: Any) -> Report:
    """Trait and coherence, 0-100, on held-out questions: `psr evaluate persona` as a function.

    Args:
        output: A new folder, or one that a run of the same recipe has left; it holds the report as files too.
        recipe: A YAML file, or the name of a recipe that ships; `None` if `options` say everything.
        **options: Fields of `PersonaRecipe`, in place of the recipe's.

    Raises:
        OSError, ValueError: what is wrong with the recipe, the data or the folder; the message says what to do.
    """
    return _evaluate("persona", output, recipe, options)


def evaluate_ifeval(output: str | Path, recipe: str | Path | None = None, **options: Any) -> Report:
    """Share of IFEval's instructions that are followed, 0-100; as `evaluate_persona`, with `IFEvalRecipe`'s fields."""
    return _evaluate("ifeval", output, recipe, options)


def evaluate_axbench(output: str | Path, recipe: str | Path | None = None, **options: Any) -> Report:
    """AxBench's three ratings, 0-2; as `evaluate_persona`, with `AxBenchRecipe`'s fields."""
    return _evaluate("axbench", output, recipe, options)


def evaluate_faithfulness(output: str | Path, recipe: str | Path | None = None, **options: Any) -> Report:
    """How near methods come to the prompt; as `evaluate_persona`, with `FaithfulnessRecipe`'s fields."""
    return _evaluate("faithfulness", output, recipe, options)


def evaluate_side_effects(output: str | Path, recipe: str | Path | None = None, **options: Any) -> Report:
    """What changes besides the trait; as `evaluate_persona`, with `SideEffectsRecipe`'s fields."""
    return _evaluate("side-effects", output, recipe, options)


def _evaluate(name: str, output: str | Path, recipe: str | Path | None, options: dict[str, Any]) -> Report:
    benchmark = next(known for known in BENCHMARKS if known.name == name)
    return run_benchmark(benchmark, load_evaluate_recipe(benchmark.recipe, recipe, options), output)[0]


def shipped_by_benchmark() -> dict[str, dict[str, Path]]:
    """{benchmark: {recipe: file}} of the recipes that ship; a recipe's name begins with its benchmark's."""
    return {
        benchmark.name: {
            name: path for name, path in shipped_evaluate_recipes().items() if name.startswith(f"{benchmark.name}-")
        }
        for benchmark in BENCHMARKS
    }
