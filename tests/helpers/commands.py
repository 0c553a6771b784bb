"""The command `psr` run in this process, a chat without a terminal, and pages as a parser sees them."""

from __future__ import annotations

import io
from html.parser import HTMLParser

from rich.console import Console
from typer.testing import CliRunner

from peft_psr import cli
from peft_psr.hub.steered_model import base_model_of
from peft_psr.serving.chat import Chat, load_chat_model, name_adapters
from peft_psr.serving.chat_session import ChatSession


def psr(*arguments, **settings):
    """`psr ARGUMENTS`: what the command's exit code and output are; errors that it does not word itself are raised."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **settings)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


CHAT_WORDS = " ".join(
    f"w{i}" for i in range(57)
)  # one for each of the model's tokens, so that text can be encoded again


def open_session(folder, *names, **settings):
    """A greedy chat with adapters of `chat_folder`, all of them if none is named."""
    adapters = name_adapters([str(folder / name) for name in names or ("formal", "brief", "loud")])
    return ChatSession(
        *load_chat_model(base_model_of(adapters), adapters), **{"max_new_tokens": 8, "temperature": 0.0, **settings}
    )


def talk(session, *lines, transcript=None):
    """What is printed, without colours."""
    console = Console(file=io.StringIO(), width=100)
    Chat(session, console, transcript).run(lines)
    return console.file.getvalue()


class Page(HTMLParser):
    """The elements of a page, with their text; fails where tags do not nest."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


def check_stands_alone(text):
    """Fails if a page runs a script, or asks for anything outside itself."""
    page = Page(text)
    assert not {element["tag"] for element in page.elements} & {"script", "link", "iframe", "object"}
    for element in page.elements:
        assert not any(name.startswith("on") for name in element)
        assert element.get("src", "data:").startswith("data:") and element.get("href", "#").startswith("#")
    assert "url(" not in text and "@import" not in text
