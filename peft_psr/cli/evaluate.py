"""`psr evaluate`: the benchmarks, each a matrix of methods, traits, models and seeds; and `psr methods`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from peft_psr.evaluation.benchmarks.benchmark import Benchmark
from peft_psr.evaluation.benchmarks.registry import BENCHMARKS

from .common import CONFIG, DRY_RUN, RECIPE, RUN_FOLDER, errors, plain_console, recipe_options, show_progress_of_runs


class _Benchmarks(TyperGroup):
    """A subcommand for each benchmark that there is by the time it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command(BENCHMARKS[cmd_name]) if cmd_name in BENCHMARKS else None


evaluate = typer.Typer(
    cls=_Benchmarks,
    no_args_is_help=True,
    help="Measure methods and adapters. Stopped at any moment, the same command goes on.",
)


def _command(benchmark: Benchmark[Any]) -> Any:
    """A benchmark's subcommand."""
    app = typer.Typer(add_completion=False)

    @app.command(name=benchmark.name, help=benchmark.summary)
    @recipe_options(benchmark.recipe)
    def run(
        recipe: str = RECIPE,
        output: Path = RUN_FOLDER,
        dry_run: bool = DRY_RUN,
        config: Path | None = CONFIG,
        **options: str | bool | None,
    ) -> None:
        _run(benchmark, recipe, output, dry_run, options)

    return typer.main.get_command(app)


def _run(
    benchmark: Benchmark[Any], recipe: str, output: Path, dry_run: bool, options: dict[str, str | bool | None]
) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
    from peft_psr.evaluation.benchmarks.run import run_benchmark
    from peft_psr.evaluation.benchmarks.workbench import Workbench
    from peft_psr.training.sampling.chat_server import ServerError, TooManyFailures

    show_progress_of_runs()
    logging.getLogger("peft_psr.training.passes.frozen").setLevel(logging.WARNING)  # it would say so for every adapter
    console = plain_console()
    with errors(console, ServerError, TooManyFailures, ImportError, FloatingPointError):
        given = {name: value for name, value in options.items() if value is not None}
        chosen = load_evaluate_recipe(benchmark.recipe, recipe or None, given)
        if dry_run:
            bench = Workbench(chosen, output, benchmark.name)
            benchmark.check(bench)
            console.print(f"would measure {', '.join(bench.method_names()) or 'no method'} beside the plain and the "
                          "prompted model")  # fmt: skip
            console.print(f"on {', '.join(bench.traits)}")
            seeds = ", ".join(map(str, chosen.seeds))
            console.print(f"of {', '.join(chosen.models)}, with seeds {seeds}, and write to {output}/")
            return
        try:
            _, files = run_benchmark(benchmark, chosen, output, console)
        except KeyboardInterrupt:
            console.print(f"stopped; the same command goes on from what is in {output}/")
            raise typer.Exit(130) from None
        for path in files:
            if path.suffix != ".png":
                console.print(f"wrote {path}")


def methods() -> None:
    """List the methods that `psr evaluate` can compare."""
    from peft_psr.evaluation.methods.registry import METHODS

    table = Table("method", "objective", "start", "source", box=None, padding=(0, 2, 0, 0))
    for method in (METHODS[name] for name in METHODS):
        table.add_row(method.name, method.objective, method.start, method.source)
    Console(highlight=False).print(table)
