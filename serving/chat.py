"""`psr chat`: loads a model with adapters and reads lines, some of them commands, until there are no more."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_psr import PSRModel
from peft_psr.base_model.loading import ModelName, load_tokenizer
from peft_psr.files import write_json
from peft_psr.hub.steered_model import load_with_adapters
from peft_psr.prompts.conversations import render_prompt
from peft_psr.text import check_unicode, composed

from .chat_session import BASE, ChatSession


def name_adapters(arguments: Sequence[str]) -> dict[str, str]:
    """{name: folder or Hub name} of arguments `NAME=WHERE`, or `WHERE`, whose last part is then the name.

    Raises:
        ValueError: no argument, a name given twice, or one that can't be written in `/use` or that PEFT can't hold.
    """
    named: dict[str, str] = {}
    for argument in arguments:
        name, equals, where = argument.partition("=")
        if not equals:
            where, name = argument, Path(argument).resolve().name
        name = composed(name)
        if not re.fullmatch(r"[\w-]+", name) or name == BASE or name in PSRModel.prefix:
            raise ValueError(
                f"{name!r} can't be the name of an adapter here (letters, digits, _ and -, but not {BASE!r} or a part "
                f"of {PSRModel.prefix!r}). Give one, such as trait={where}"
            )
        if name in named:
            raise ValueError(f"Two adapters are named {name!r}. Name one of them otherwise, such as {name}2={where}")
        named[name] = where
    if not named:
        raise ValueError("Name at least one adapter: a folder, a Hub name, or NAME=FOLDER.")
    return named


def check_transcript(path: Path | None) -> None:
    """Raise `FileExistsError` if the file is there already, `FileNotFoundError` if its folder is not."""
    if path is not None and path.exists():
        raise FileExistsError(f"--output {path} is there already; name another file.")
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}.")


def load_chat_model(base: ModelName | str, adapters: Mapping[str, str], **settings: Any) -> tuple[PeftModel, Any]:
    """As `load_with_adapters`, also in what it raises, and `ValueError` for a base model without a chat template."""
    name, revision = (base, None) if isinstance(base, str) else base
    render_prompt(load_tokenizer(name, revision, **settings), [{"role": "user", "content": "hello"}])
    return load_with_adapters(base, adapters, **settings)


class Chat:
    """The terminal's side of a conversation: commands, answers, a transcript in JSON, rewritten after each answer."""

    def __init__(self, session: ChatSession, console: Console, transcript: Path | None = None) -> None:
        self.session, self.console, self.transcript = session, console, transcript
        self.turns: list[dict[str, Any]] = []
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/traits": (self._traits, "", "the loaded adapters, and which of them are active"),
            "/use": (
                self._use,
                "formal+concise",
                f"steer by these, whose edits add up; '/use {BASE}': the base model",
            ),
            "/alpha": (self._alpha, "[NAME] 1.5", "set the strength of one adapter, or of all active ones"),
            "/gates": (self._gates, "", "the last answer, darker where the gates were open wider"),
            "/system": (self._system, "TEXT", "set the system turn; without TEXT, take it away"),
            "/reset": (self._reset, "", "forget the conversation"),
            "/help": (self._help, "", "this list"),
            "/quit": (self._quit, "", "leave; so does Ctrl-D"),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer and obey line by line, to the end or to `/quit`. Ctrl-C ends what is being done, not the session."""
        self._traits("")
        self._say("/help lists the commands")
        for line in lines:
            try:
                self.handle(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print()

    def handle(self, line: str) -> None:
        """Obey a command, `EOFError` for `/quit`, or answer a question; a mistake is printed and changes nothing."""
        command, _, rest = line.strip().partition(" ")
        try:
            if command.startswith("/"):
                if command not in self.commands:
                    raise ValueError(f"No command {command!r}; there are: {', '.join(self.commands)}.")
                self.commands[command][0](rest.strip())
            elif command:
                self._ask(check_unicode(line, "The line").strip())
        except ValueError as error:
            self.console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)

    def _ask(self, question: str) -> None:
        started = False

        def show(text: str) -> None:
            nonlocal started
            if not started:
                self.console.print(f"[dim]{'+'.join(session.active) or 'base model'}:[/] ", end="", highlight=False)
                started = True
            self.console.out(text, end="", highlight=False)

        session = self.session
        answer = session.ask(question, show)
        self.console.print()
        notes = {
            "interrupted": "stopped",
            "max_new_tokens": f"cut off after {session.max_new_tokens} tokens (--max-new-tokens)",
            "context": "cut off: the model's context is full; /reset to start anew",
        }
        if answer.cut is not None:
            self._say(f"({notes[answer.cut]})")
        if answer.turn is None:
            self._say("(its reasoning did not end in an answer, so this question is left out of the conversation)")
        turn = {"system": session.system, "user": question, "assistant": answer.text, "alphas": answer.alphas}
        self.turns.append(turn | {"cut": answer.cut})
        if self.transcript is not None:
            write_json(self.transcript, {"schema": 1, "seed": session.seed, "turns": self.turns})

    def _traits(self, rest: str) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("active", "adapter", "alpha", "layers", "rank", "gate", "positions"):
            table.add_column(column)
        for name in self.session.names:
            config = self.session.config(name)
            layers = _ranges(self.session.layers(name))
            active = "yes" if name in self.session.active else ""
            table.add_row(active, name, f"{config.alpha:g}", layers, str(config.r), config.gate, config.positions)
        self.console.print(table)

    def _use(self, rest: str) -> None:
        if not rest:
            raise ValueError(f"/use needs adapters: {'+'.join(self.session.names)}, some of them, or {BASE}.")
        self.session.use([] if rest == BASE else [name.strip() for name in composed(rest).split("+")])
        self._say_active()

    def _alpha(self, rest: str) -> None:
        *names, number = composed(rest).split() or [""]
        try:
            alpha = float(number)
        except ValueError:
            alpha = None
        if alpha is None or len(names) > 1:
            raise ValueError(f"/alpha needs a number: /alpha 1.5, or /alpha {self.session.names[0]} 1.5")
        self.session.set_alpha(alpha, *names)
        self._say_active()

    def _say_active(self) -> None:
        session = self.session
        active = " + ".join(f"{name} (alpha {session.config(name).alpha:g})" for name in session.active)
        self._say(f"active: {active or BASE}")

    def _say(self, text: str) -> None:
        self.console.print(f"[dim]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def _gates(self, rest: str) -> None:
        gates = self.session.gates(self.console.color_system is None, self.console.encoding)
        for name, text in gates.items():
            self.console.print(f"[dim]{name}:[/] ", end="", highlight=False)
            self.console.print(text, soft_wrap=True)

    def _system(self, rest: str) -> None:
        self.session.set_system(check_unicode(rest, "The text"))
        self._say("system turn set" if rest else "no system turn")

    def _reset(self, rest: str) -> None:
        self.session.reset()
        self._say("conversation forgotten")

    def _help(self, rest: str) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for command, (_, arguments, meaning) in self.commands.items():
            table.add_row(escape(f"{command} {arguments}"), meaning)
        self.console.print(table, highlight=False)

    def _quit(self, rest: str) -> None:
        raise EOFError


def read_lines(console: Console) -> Iterator[str]:
    """Lines typed by a user, with history where Python has readline, or piped in, which are then printed too."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            console.print(f"> {escape(line.rstrip())}", highlight=False, soft_wrap=True)
            yield line
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]/quit or Ctrl-D to leave[/]", highlight=False)


def _ranges(layers: Sequence[int | str]) -> str:
    """Layer numbers for reading, "0-5, 8"; layers without numbers by name."""
    parts: list[list[int | str]] = []
    for layer in layers:
        if parts and isinstance(layer, int) and layer - 1 == parts[-1][-1]:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
