"""What every `psr` command shares: output in any encoding, `~`, options from a file, errors in one line."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.text import Text

from peft_psr.training.runs.recipe_fields import RecipeFields, in_words
from peft_psr.training.runs.yaml_reading import read_yaml


def accept_any_encoding() -> None:
    """Have streams that are not UTF-8 (Windows' pipes) show by escapes what they lack, and take any byte."""
    for stream, way in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"),
                        (sys.stdin, "surrogateescape")):  # fmt: skip
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=way)


def home(value: Any) -> Any:
    """As an option's callback: `~` in a path is the user's folder, also behind `--option=`, `NAME=` and in YAML."""
    if isinstance(value, list | tuple):
        return [home(item) for item in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if not isinstance(value, str):
        return value
    name, equals, where = value.partition("=")
    own = value.startswith("~")  # a folder's name may hold "=" too
    return f"{name}={os.path.expanduser(where)}" if equals and not own else os.path.expanduser(value)


DRY_RUN = typer.Option(False, "--dry-run", help="Check everything, say what would be done, do nothing.")
RECIPE = typer.Argument("", help="A YAML file, or the name of a recipe that ships (see `psr recipes`).")
RUN_FOLDER = typer.Option(..., callback=home, help="A new folder, or one that the same recipe's run has left.")
ADAPTERS = typer.Argument(callback=home, help="Folders or Hub names of adapters, or NAME=FOLDER to name one.")
MODEL = typer.Option("", callback=home, help="Folder or Hub name of the base model; the adapters' own by default.")
REVISION = typer.Option("", help="Branch, tag or commit of the base model; the adapters' own by default.")
CHAT_TEMPLATE = typer.Option(None, callback=home, help="File with a chat template, in place of the model's own.")
TEMPLATE_ARGS = typer.Option(
    "", help="Arguments of the chat template as JSON: '{\"enable_thinking\": false}'; by default the adapters' own."
)
TRUST_REMOTE_CODE = typer.Option(False, "--trust-remote-code", help="Run code that comes with a model on the Hub.")


def tokenizer_settings(
    adapters: Mapping[str, str], chat_template: Path | None, template_args: str, trust_remote_code: bool
) -> dict[str, Any]:
    """What `peft_psr.base_model.loading.load_tokenizer` is given, from a command's options and its adapters.

    Args:
        adapters: {name: folder or Hub name}.
        chat_template: A file, or `None`.
        template_args: A JSON object, or empty for what the adapters were trained with.
        trust_remote_code: As given.

    Raises:
        ValueError: `template_args` is no JSON object of arguments, or the adapters were trained with different ones.
    """
    from peft_psr.hub.steered_model import template_args_for
    from peft_psr.prompts.chat_template import check_template_args

    given: Any = None
    if template_args:
        try:
            given = json.loads(template_args)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise ValueError(
                "--template-args must be a JSON object such as '{\"enable_thinking\": false}', "
                f"got {template_args!r}."
            )
        check_template_args(given)
    return {
        "chat_template": None if chat_template is None else str(chat_template),
        "template_args": template_args_for(adapters, given),
        "trust_remote_code": trust_remote_code,
    }


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a YAML file's options as defaults, so that what stands on the command line wins."""
    if path is None or context.resilient_parsing:
        return path
    path = home(path)
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"can't read {path}: {error}") from error
    if not isinstance(content or {}, dict):
        raise typer.BadParameter(f"{path} must hold options such as 'seed: 1', got {type(content).__name__}.")
    known = {parameter.name for parameter in context.command.params} - {"config"}
    options: dict[str, Any] = {}
    for written, value in (content or {}).items():
        name = str(written).replace("-", "_")
        if name in options:
            raise typer.BadParameter(f"{path} gives {name} twice, written in two ways; leave one out.")
        options[name] = json.dumps(value, default=str) if isinstance(value, dict) else value  # as on the command line
    unknown = sorted(set(options) - known)
    if unknown:
        raise typer.BadParameter(f"{path} has unknown options {unknown}; there are {sorted(known)}.")
    context.default_map = {**(context.default_map or {}), **options}
    return path


CONFIG = typer.Option(None, help="YAML file with any of these options.", callback=load_config, is_eager=True)


def plain_console() -> Console:
    """Prints text as it is, in lines of any length."""
    return Console(soft_wrap=True, highlight=False, markup=False)


def quiet_transformers() -> None:
    """No progress bars of transformers' own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def show_progress_of_runs() -> None:
    """What this package logs, with the time, and nothing of transformers' bars."""
    quiet_transformers()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("peft_psr").setLevel(logging.INFO)


@contextmanager
def errors(console: Console, *others: type[Exception]) -> Iterator[None]:
    """Print what a user can mend as one line, and exit with 2."""
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, RecursionError, *others)
    try:
        yield
    except kinds as error:
        # transformers' word for the folder of a model that is not there
        lost = isinstance(error, OSError) and isinstance(error.__cause__, HFValidationError)
        console.print(
            Text.assemble(("error: ", "bold red"), f"{'there is no such folder. ' if lost else ''}{error}"),
            soft_wrap=True,
            highlight=False,
        )
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
