"""Benchmarks as functions: `psr evaluate` from a program."""

from pathlib import Path
from typing import Any

from rich.console import Console

from peft_psr.evaluation.reports.report import Report
from peft_psr.evaluation.reports.report_files import write_report

from .benchmark import Benchmark, Recipe
from .recipe import load_evaluate_recipe
from .registry import BENCHMARKS
from .workbench import Workbench


def run_benchmark(
    benchmark: Benchmark[Recipe], recipe: Recipe, output: str | Path, console: Console | None = None
) -> tuple[Report, list[Path]]:
    """Measures what is not measured yet, and writes the report into the folder; returns the report and its files.

    The folder is a new one, or one that a run of the same recipe has left; progress is shown at the console.

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
    benchmark = BENCHMARKS[name]
    return run_benchmark(benchmark, load_evaluate_recipe(benchmark.recipe, recipe, options), output)[0]
