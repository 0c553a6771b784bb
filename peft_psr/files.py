"""Files that are whole or as they were before."""

from __future__ import annotations

import os
import re
from pathlib import Path


_HALF_PAIR = re.compile("[\ud800-\udfff]")


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is whole or as it was before.

    Raises:
        OSError: the disk is full, for one; the message says what to do.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(encode(content) if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise not_written(error, path) from error


def encode(text: str) -> bytes:
    r"""UTF-8, with half a surrogate pair, which JSON may hold and UTF-8 may not, as its escape (\ud83d)."""
    return text.encode("utf-8", "backslashreplace")


def has_half_pair(text: str) -> bool:
    """Whether text holds half a surrogate pair: half of an emoji, for one, that was cut in two."""
    return _HALF_PAIR.search(text) is not None


def without_half_pairs(text: str) -> str:
    """The text without halves of surrogate pairs, which no tokenizer and no file in UTF-8 takes."""
    return _HALF_PAIR.sub("", text)


def not_written(error: OSError, path: Path) -> OSError:
    """An error that says which file it was and what to do."""
    return OSError(
        error.errno,
        f"{error.strerror or error}: {path} could not be written. Nothing before it is lost: make room, then start "
        "the same command again",
    )
