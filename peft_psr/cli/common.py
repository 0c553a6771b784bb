"""What every `psr` command shares: output in any encoding, `~`, errors in one line."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text


def accept_any_encoding() -> None:
    """Have streams that are not UTF-8 (Windows' pipes) show by escapes what they lack, and take any byte."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")


def home(value: Any) -> Any:
    """With `~` in a path as the user's folder, also behind `--option=`, `NAME=` and in YAML."""
    if isinstance(value, list | tuple):
        return [home(item) for item in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if not isinstance(value, str):
        return value
    name, equals, where = value.partition("=")
    own = value.startswith("~")  # a folder's name may hold "=" too
    return f"{name}={os.path.expanduser(where)}" if equals and not own else os.path.expanduser(value)


def plain_console() -> Console:
    """Prints text as it is, in lines of any length."""
    return Console(soft_wrap=True, highlight=False, markup=False)


def quiet_transformers() -> None:
    """No progress bars of transformers' own, and no word on what it will change one day."""
    warnings.simplefilter("ignore", FutureWarning)
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
        lost = isinstance(error, OSError) and type(error.__cause__).__name__ == "HFValidationError"
        line = Text.assemble(("error: ", "bold red"), f"{'there is no such folder. ' if lost else ''}{error}")
        console.print(line, soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
