"""Records that outlive the process that writes them: append-only JSONL.

A record is one line. A process that is killed leaves at most one line without its end, which is dropped when the
journal is opened again; a disk that is full leaves none. Everything before it is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_psr.files import encode, not_written


class Journal:
    """An append-only JSONL file, made if it is not there; a context manager.

    One process writes it at a time: whoever opens it sees to that. A last line that was cut off is dropped.

    Raises:
        OSError: it can't be opened or written.
        ValueError: a line is damaged in another way than a kill can do; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = list(_read(path)) if path.exists() else []
        self._file = open_append(path)
        self._length = _whole_lines(path)
        self._file.truncate(self._length)

    def append(self, record: dict[str, Any]) -> None:
        """Writes one record, so that a kill afterwards does not lose it.

        Raises `OSError`, with what to do, if the disk is full, for one; the file is left as it was.
        """
        line = encode(json.dumps(record, ensure_ascii=False) + "\n")
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._length)
            raise not_written(error, self.path) from error
        self._length += len(line)
        self.records.append(record)

    def close(self) -> None:
        """Sees that everything is on the disk, and closes the file."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_append(path: Path) -> Any:
    """The file of a journal, unbuffered: what is written is with the operating system."""
    return path.open("ab", buffering=0)


def _whole_lines(path: Path) -> int:
    """Bytes of the file up to the end of its last whole line."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1


def _read(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes()[: _whole_lines(path)].split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} of {len(lines)} is damaged: {error}. Take the line out of the file; what it "
                "held is made again."
            ) from error
        yield record
