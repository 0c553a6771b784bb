"""What every `psr` command shares: options from a file, errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
import yaml
from rich.console import Console
from rich.text import Text


def load_config(context: typer.Context, path: Path | None) -> Path | None:
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


@contextmanager
def errors(console: Console, *others: type[Exception]) -> Iterator[None]:
    """Print what a user can mend as one line, and exit with 2."""
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, *others)
    try:
        yield
    except kinds as error:
        console.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(2) from error
