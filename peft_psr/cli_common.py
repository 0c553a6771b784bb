"""What every `psr` command shares: options from a file, errors in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
import yaml
from rich.console import Console
from rich.text import Text

from peft_psr.training.recipe_fields import RecipeFields, in_words


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


def recipe_options(recipe: type[RecipeFields]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of a recipe; those that are set arrive as its `**options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        fields = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(
                    None,
                    help=f"{field.description} ({in_words(recipe, name)})",
                    metavar=None if field.annotation is bool else "VALUE",
                ),
                annotation=bool | None if field.annotation is bool else str | None,
            )
            for name, field in recipe.model_fields.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        return command

    return decorate
