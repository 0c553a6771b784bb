"""Text and JSON as users bring them: UTF-8, whatever the locale, or refused in words; names in one Unicode form."""

import codecs
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(path: str | os.PathLike) -> str:
    """A file's text, which is UTF-8 whatever the locale; a byte order mark is left out.

    Raises:
        OSError: the file is not there or can't be read.
        ValueError: it is in another encoding; the message names file and line.
    """
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:1000]:
        raise ValueError(f"{path} is UTF-16 or no text at all; save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line} is not UTF-8: it holds the byte 0x{content[error.start]:02x}, as a file saved as "
            "Latin-1 or Windows-1252 does. Save it as UTF-8."
        ) from error


def text_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Yields a file's lines that are not blank, each with its number; raises as `read_text`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line


def parse_json(text: str, where: str) -> Any:
    """What JSON says; raises `ValueError`, naming `where`, if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def check_unicode(text: str, where: str) -> str:
    """The text itself; raises `ValueError`, naming `where`, if it holds half a surrogate pair, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {text[error.start]!r} at character {error.start + 1}, half of an emoji or a byte that is "
            "not UTF-8; write the whole character or leave it out."
        ) from None
    return text


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): macOS and some keyboards write an accent as a letter of its own."""
    return unicodedata.normalize("NFC", name)
