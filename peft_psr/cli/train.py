"""`psr train`: adapters from triplets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from peft_psr.training.runs.train.recipe import TrainRecipe, load_train_recipe

from .common import errors, plain_console, show_progress_of_runs
from .options import RunOptions, recipe_command


@recipe_command(TrainRecipe, load_train_recipe)
def train(recipe: TrainRecipe, options: RunOptions) -> None:
    """Train an adapter for each trait. Stopped at any moment, the same command goes on where it was."""
    show_progress_of_runs()
    from peft_psr.training.data.by_trait import in_words
    from peft_psr.training.runs.train.run import TrainRun

    console, output = plain_console(), options.output
    with errors(console, ImportError, FloatingPointError):
        run = TrainRun(output, recipe)
        if options.dry_run:
            plans = run.check()
            together = ", together" if recipe.parallel else ""
            console.print(
                f"would train {len(plans)} adapter(s) of {recipe.model}{together}, r={recipe.r}, "
                f"start: {recipe.start}, objective: {recipe.objective}"
            )
            for plan in plans:
                held_out = f", {plan.held_out} held out" if plan.held_out else ""
                todo = "is there already" if plan.finished else f"at most {plan.steps} steps"
                console.print(f"{plan.trait}: {plan.train} triplets{held_out}; {todo}")
                if plan.left_out:
                    console.print(f"{plan.trait}: {len(plan.left_out)} triplets left out. {in_words(plan.left_out)}")
            console.print(f"and write to {output}/")
            return
        try:
            summaries = run.run()
        except KeyboardInterrupt:
            console.print(f"stopped; the same command goes on from the last checkpoint in {output}/")
            raise typer.Exit(130) from None
    if run.writes:
        _print_table(summaries, run.folder_of)


def _print_table(summaries: dict[str, dict[str, Any]], folder_of: Callable[[str], Path]) -> None:
    """One line a trait."""
    console = Console(highlight=False, markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("trait", no_wrap=True)
    for title in ("seconds", "loss", "held out", "live gates", "at 0", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    for trait, summary in summaries.items():
        held_out = summary.get("eval_loss")
        table.add_row(
            trait,
            f"{summary['start_seconds'] + summary['seconds']:.1f}",
            f"{summary['loss']:.4g}",
            "" if held_out is None else f"{held_out:.4g}",
            f"{100 * summary['live_gates']:.0f} %",
            f"{100 * summary['gate_sparsity']:.0f} %",
            f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
        )
    console.print(table)
    for trait in summaries:
        console.print(f"{trait}: {folder_of(trait)}", soft_wrap=True)
    if any(summary["trained_with"] for summary in summaries.values()):
        console.print("trained together: seconds, gates and memory are those of all of them")
