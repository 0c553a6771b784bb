"""`psr evaluate`: the benchmarks, each a matrix of methods, traits, models and seeds; and `psr methods`."""

import logging
from functools import partial
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from peft_psr.evaluation.benchmarks.benchmark import Benchmark
from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, load_evaluate_recipe
from peft_psr.evaluation.benchmarks.registry import BENCHMARKS

from .common import errors, plain_console, show_progress_of_runs
from .options import RunOptions, recipe_command


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
    @recipe_command(benchmark.recipe, partial(load_evaluate_recipe, benchmark.recipe))
    def run(recipe: EvaluateRecipe, options: RunOptions) -> None:
        _run(benchmark, recipe, options)

    return typer.main.get_command(app)


def _run(benchmark: Benchmark[Any], recipe: EvaluateRecipe, options: RunOptions) -> None:
    show_progress_of_runs()
    from peft_psr.evaluation.benchmarks.run import run_benchmark
    from peft_psr.evaluation.benchmarks.workbench import Workbench
    from peft_psr.training.sampling.chat_server import ServerError, TooManyFailures

    logging.getLogger("peft_psr.training.passes.frozen").setLevel(logging.WARNING)  # it would say so for every adapter
    console, output = plain_console(), options.output
    with errors(console, ServerError, TooManyFailures, ImportError, FloatingPointError):
        if options.dry_run:
            bench = Workbench(recipe, output, benchmark.name)
            benchmark.check(bench)
            listed = ", ".join(bench.method_names()) or "no method"
            console.print(f"would measure {listed} beside the plain and the prompted model")
            console.print(f"on {', '.join(bench.traits)}")
            seeds = ", ".join(map(str, recipe.seeds))
            console.print(f"of {', '.join(recipe.models)}, with seeds {seeds}, and write to {output}/")
            return
        try:
            _, files = run_benchmark(benchmark, recipe, output, console)
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
