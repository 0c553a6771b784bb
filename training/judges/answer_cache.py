"""Answers of judges on disk, found again by what was asked, so that a rerun costs nothing.

One SQLite file. Several processes may use it at once; a kill leaves either all of an answer or nothing of it.
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from peft_psr.files import encode, sha256
from peft_psr.training.data.draws import Failure


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
        """Open the cache, or make it with its folders; raises `OSError` if it can't be, or is no cache."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers that are there, by key; raises `OSError` if the file can't be read."""
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
        """Keep answers, all or none of them; raises `OSError` if the file can't be written, e.g. for want of space."""
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


def ask_once(
    texts: Iterable[str],
    key: Callable[[str], str],
    ask: Callable[[list[str]], Generator[dict[str, Any | Failure]]],
    cache: AnswerCache | None,
    usage: Counter[str],
) -> dict[str, Any]:
    """The answer to each text, or a `Failure`: from the cache by its `key`, or asked for and put there as it comes.

    Args:
        texts: What is asked; the same text is asked about once.
        key: A text's in the cache.
        ask: Yields {text: answer (JSON) or why there is none}, some at a time.
        cache: Where answers are kept, if anywhere; failures are not.
        usage: Its `cached` counts the answers found.
    """
    keys = {text: key(text) for text in texts}
    known = cache.get(keys.values()) if cache else {}
    answers: dict[str, Any] = {text: known[key] for text, key in keys.items() if key in known}
    usage["cached"] += len(answers)
    if missing := [text for text in keys if text not in answers]:
        with closing(ask(missing)) as batches:
            for batch in batches:
                answers |= batch
                if cache:
                    cache.put({keys[text]: a for text, a in batch.items() if not isinstance(a, Failure)})
    return answers
