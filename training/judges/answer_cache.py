"""Answers of judges on disk, found again by what was asked, so that a rerun costs nothing.

One SQLite file. Several processes may use it at once; a kill leaves either all of an answer or nothing of it.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from peft_psr.files import encode, sha256


KEYS_A_QUERY = 500
"""SQLite takes a limited number of variables."""


def answer_key(model: Mapping[str, Any], prompt: Any, parameters: Mapping[str, Any]) -> str:
    """SHA-256 of what was asked: of whom, what, and how, all JSON. API keys have no place in it."""
    return sha256(json.dumps([model, prompt, parameters], sort_keys=True, ensure_ascii=False))


class AnswerCache:
    """Answers, as JSON, by key.

    A model is known by its name: delete the file when another model answers under the same name.
    """

    def __init__(self, path: str | os.PathLike):
        """Open the cache, or make it, with the folders above it.

        Raises:
            OSError: the file can't be made or read, or is no cache.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers that are there, by key.

        Raises:
            OSError: the file can't be read.
        """
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Any] = {}
        with self._connection() as connection:
            for start in range(0, len(wanted), KEYS_A_QUERY):
                some = wanted[start : start + KEYS_A_QUERY]
                marks = ",".join("?" * len(some))
                rows = connection.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some)
                found |= {key: json.loads(answer) for key, answer in rows}
        return found

    def put(self, answers: Mapping[str, Any]) -> None:
        """Keep answers, all or none of them.

        Raises:
            OSError: the file can't be written, e.g. for want of space.
        """
        rows = [(key, encode(json.dumps(answer, ensure_ascii=False)).decode()) for key, answer in answers.items()]
        with self._connection() as connection:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # one for each use: a connection can be shared neither by threads nor by processes
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise OSError(
                f"The answer cache {self.path}: {error}. Check its disk; if it is damaged or another program's file, "
                "move it away or choose another place."
            ) from error
