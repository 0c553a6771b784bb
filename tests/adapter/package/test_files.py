"""JSON and digests, whose values are written down in runs that were begun before; checks of files and folders."""

from __future__ import annotations

import json

import pytest

from peft_psr.files import as_json_lines, check_file, check_new_folder, digest, read_json, sha256, write_json
from peft_psr.training.data.draws import draw_seed
from peft_psr.training.runs.run_folder import begun_run


def test_digests_are_what_runs_have_written_down():
    data = [{"b": "é\ud83d", "a": 1.5}, ["x", None]]
    known = "d067"
    assert digest(data) == digest([{"a": 1.5, "b": "é\ud83d"}, ("x", None)])
    assert digest(data, 4) == known and len(digest(data)) == 64
    assert sha256("abc") == sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert draw_seed(0, "a/0") == 1746515184


def test_json_goes_and_comes(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1.0, None]}, allow_nan=False)
    assert read_json(tmp_path / "a.json") == {"é": [1.0, None]} and "é" in (tmp_path / "a.json").read_text("utf-8")
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"), allow_nan=False)
    assert read_json(tmp_path / "a.json") == {"é": [1.0, None]}
    assert [json.loads(line) for line in as_json_lines([{"a": "\n"}, 2]).splitlines()] == [{"a": "\n"}, 2]


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    check_file(tmp_path / "file", "x")
    for path in (tmp_path / "new", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"trait_prompt: no file .*{path.name}"):
            check_file(path, "trait_prompt")
    check_new_folder(tmp_path / "new")
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_new_folder(tmp_path / "file")
    with pytest.raises(FileExistsError, match="is not empty"):
        check_new_folder(tmp_path)


def test_a_folder_holds_the_run_or_another_kind(tmp_path):
    assert begun_run(tmp_path / "new", "run.json", "run") == begun_run(tmp_path, "run.json", "run") == {}
    for name in (".lock", "run.json.partial"):  # of a process that was killed at once
        (tmp_path / name).touch()
    assert begun_run(tmp_path, "run.json", "run") == {}
    write_json(tmp_path / "run.json", {"fixed": {"seed": 1}})
    assert begun_run(tmp_path, "run.json", "run", ["fixed"]) == {"fixed": {"seed": 1}}
    with pytest.raises(FileExistsError, match=r"holds no run of psr train \(run.json\)"):
        begun_run(tmp_path, "run.json", "run of psr train", ["fixed", "triplets"])
