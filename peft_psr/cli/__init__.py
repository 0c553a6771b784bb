"""The `psr` command: thin, one file a group of commands; the work is done elsewhere, and imported when it is done."""

import sys


try:
    import typer

    from .adapters import _cut_settings as _cut_settings
    from .adapters import compose, push
    from .chat import chat
    from .common import accept_any_encoding
    from .demo import demo
    from .evaluate import evaluate, methods
    from .show import show
    from .train import train
    from .triplets import draft, recipes, triplets
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


for command in (demo, push, compose, chat, triplets, recipes, draft, train, methods, show):
    app.command()(command)
app.add_typer(evaluate, name="evaluate")


def main() -> None:
    """Entry point of the `psr` command."""
    accept_any_encoding()
    app()
