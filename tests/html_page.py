"""A page's elements as a parser sees them."""

from __future__ import annotations

from html.parser import HTMLParser


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
