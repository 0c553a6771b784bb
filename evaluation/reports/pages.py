"""HTML pages that stand alone: no other file, no network, no script; every text is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(template: str, **content: Any) -> str:
    """A page from one of the `<template>.html.jinja` beside this file, with what it names."""
    return _TEMPLATES.get_template(f"{template}.html.jinja").render(**content)
