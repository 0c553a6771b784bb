"""The cache of answers: by content, for several processes, through a kill and a full disk."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time

import pytest

from peft_psr.training.judges.answer_cache import AnswerCache, answer_key


def test_keys_tell_questions_apart():
    keys = {answer_key({"model": m}, p, {"t": t}) for m in "ab" for p in ("x", "y") for t in (0, 1)}
    assert len(keys) == 8
    assert answer_key({"a": 1, "b": 2}, "x", {}) == answer_key({"b": 2, "a": 1}, "x", {})


def test_half_a_character_is_kept(tmp_path):
    cache = AnswerCache(tmp_path / "answers")
    key = answer_key({}, "half \ud83d", {})
    cache.put({key: {"text": "é \ud83d"}})
    assert cache.get([key]) == {key: {"text": "é \ud83d"}}


def test_cache_holds_more_than_a_query(tmp_path):
    cache = AnswerCache(tmp_path / "answers")
    cache.put({f"k{i}": {"score": i} for i in range(1200)})
    assert cache.get(f"k{i}" for i in range(1300)) == {f"k{i}": {"score": i} for i in range(1200)}


def _write(path, name, count):
    cache = AnswerCache(path)
    for i in range(count):
        cache.put({f"{name}/{i}": {"text": "x" * 200}})


@pytest.mark.long
def test_cache_of_several_processes_and_a_kill(tmp_path):
    path = tmp_path / "answers"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, name, 10)) for name in "abc"]
    endless = context.Process(target=_write, args=(path, "killed", 10**6))
    for process in [*writers, endless]:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    cache = AnswerCache(path)
    while not cache.get(["killed/5"]):
        time.sleep(0.01)
    endless.kill()
    endless.join()
    assert len(cache.get(f"{name}/{i}" for name in "abc" for i in range(10))) == 30
    killed = len(cache.get(f"killed/{i}" for i in range(10000)))
    assert sqlite3.connect(path).execute("SELECT count(*) FROM answers").fetchone() == (30 + killed,)


def test_cache_that_is_none(tmp_path):
    (tmp_path / "answers").write_text("not a database, and longer than a header of one would be" * 10)
    with pytest.raises(OSError, match="answers: .*not a database"):
        AnswerCache(tmp_path / "answers")


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    cache = AnswerCache(tmp_path / "answers")
    cache.put({"old": 1})
    connect = sqlite3.connect

    def full(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(OSError, match="full"):
        cache.put({f"new{i}": "x" * 1000 for i in range(100)})
    assert cache.get(["old", "new0"]) == {"old": 1}
