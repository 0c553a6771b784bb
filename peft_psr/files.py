"""Files that are whole or as they were before."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is whole or as it was before.

    Raises:
        OSError: the disk is full, for one; the message says what to do.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise not_written(error, path) from error


def not_written(error: OSError, path: Path) -> OSError:
    """An error that says which file it was and what to do."""
    return OSError(
        error.errno,
        f"{error.strerror or error}: {path} could not be written. Nothing before it is lost: make room, then start "
        "the same command again",
    )
