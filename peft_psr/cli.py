"""The `psr` command: thin, one function a subcommand; the work is done elsewhere."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path


# before huggingface_hub is imported, which reads it once: the demo needs no network and is not to wait for one
if sys.argv[1:2] == ["demo"]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import typer
    import yaml
    from rich.console import Console
except ImportError as error:  # pragma: no cover - depends on what is installed
    sys.exit(
        f"The psr command needs more than the adapter does ({error.name} is missing): pip install 'peft-psr[eval]'"
    )


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompt Steering Replacement: replace a steering prompt by a few kilobytes of adapter.",
)


@app.callback()
def _psr() -> None:
    """One subcommand for each step of the way."""


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a YAML file's options as defaults, so that what stands on the command line wins."""
    if path is None or context.resilient_parsing:
        return path
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"can't read {path}: {error}") from error
    known = {parameter.name for parameter in context.command.params} - {"config"}
    options = (
        {str(name).replace("-", "_"): value for name, value in options.items()} if isinstance(options, dict) else None
    )
    if options is None:
        raise typer.BadParameter(f"{path} must hold options such as 'seed: 1'.")
    unknown = sorted(set(options) - known)
    if unknown:
        raise typer.BadParameter(f"{path} has unknown options {unknown}; there are {sorted(known)}.")
    context.default_map = {**(context.default_map or {}), **options}
    return path


@app.command()
def demo(
    trait: str = typer.Option("sycophantic", help="A trait of the embedded model, or 'all'."),
    model: str = typer.Option("", help="Folder of a rebuilt embedded model; the one in the package by default."),
    output: Path = typer.Option(Path("psr_demo"), help="An empty folder for adapter, results and figures."),
    seed: int = typer.Option(0, min=0, help="Makes the run repeatable on the same machine."),
    quick: bool = typer.Option(False, "--quick", help="Under 90 seconds; fewer samples, rougher numbers."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything, say what would be done, do nothing."),
    config: Path | None = typer.Option(
        None, help="YAML file with any of these options.", callback=_load_config, is_eager=True
    ),
) -> None:
    """Train, save, reload and measure PSR adapters on the embedded model, offline."""
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging

    from peft_psr import tiny_chat_path
    from peft_psr.evaluation.demo import check_output, run_demo
    from peft_psr.evaluation.methods import METHODS
    from peft_psr.tiny_chat import TRAITS

    logging.disable_progress_bar()
    traits = list(TRAITS) if trait == "all" else [trait]
    console = Console()
    try:
        for name in traits:
            if name not in TRAITS:
                raise ValueError(f"No trait {name!r}; there are: {', '.join(TRAITS)}, or 'all'.")
        check_output(output)
        if model and not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(f"--model {model} is no model folder (it has no config.json).")
        if dry_run:
            console.print(f"would train {', '.join(method.name for method in METHODS)}")
            console.print(f"for {', '.join(traits)} with seed {seed}, and write to {output}/")
            return
        run_demo(traits, model or tiny_chat_path(), output, seed, quick, console)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error


def main() -> None:
    """Entry point of the `psr` command."""
    app()


if __name__ == "__main__":
    main()
