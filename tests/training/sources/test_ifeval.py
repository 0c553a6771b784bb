"""IFEval's files, read."""

from __future__ import annotations

import json

import pytest
from helpers.ifeval import read, row

from peft_psr.training.sources.ifeval import read_ifeval


def test_pairs(tmp_path):
    words = row("keywords:existence", {"keywords": ["sun"]}, prompt="Describe the weather. Say sun.")
    pairs = read(tmp_path, row(), words, words | {"kwargs": [{"keywords": ["rain"]}]})
    ids = ["punctuation:no_comma/7/0", "keywords:existence/7/0", "keywords:existence/7/1"]
    assert [pair.id for pair in pairs] == ids
    assert pairs[1].trait == "keywords:existence" and not pairs[1].negative
    assert pairs[1].prompt == [{"role": "user", "content": "Describe the weather."}]
    assert pairs[1].steered_prompt == [{"role": "user", "content": "Describe the weather. Say sun."}]
    assert pairs[2].metadata == {
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["rain"]}],
        "key": "7",
    }


def test_chosen_instructions_keep_their_ids(tmp_path):
    other = row("startend:quotation")
    assert (
        read(tmp_path, row(), other, other, instruction_ids=["startend:quotation"])
        == read(tmp_path, row(), other, other)[1:]
    )
    both = row() | {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    joined = "punctuation:no_comma + startend:quotation"
    assert [pair.trait for pair in read(tmp_path, row(), both, other, instruction_ids=[joined])] == [joined]
    with pytest.raises(ValueError, match="holds no prompts with startend:quote. .*punctuation:no_comma"):
        read(tmp_path, row(), instruction_ids=["startend:quote"])
    with pytest.raises(ValueError, match="holds no prompts. Its instructions: none"):
        read(tmp_path)


def test_a_folder_is_read_file_by_file(tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    files = {"b": [row(), row("startend:quotation")], "a": [row(), row(key=8)]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "LICENSE.txt").write_text("MIT")
    ids = [pair.id for pair in read_ifeval(folder)]
    assert ids == [
        "punctuation:no_comma/7/0",
        "punctuation:no_comma/8/0",
        "punctuation:no_comma/7/1",
        "startend:quotation/7/0",
    ]
    for empty in (tmp_path / "lost", tmp_path):
        with pytest.raises(FileNotFoundError, match="prompts are not at .* give their JSONL file or a folder"):
            read_ifeval(empty)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt must be text that is not empty, got ''"),
        ({"prompt_without_instruction": None}, "prompt_without_instruction must be text"),
        ({"instruction_id_list": []}, "instruction_id_list must be a list"),
        ({"kwargs": []}, "kwargs must be a list of 1 objects"),
        ({"kwargs": ["a"]}, "kwargs must be a list of 1 objects"),
    ],
)
def test_malformed_lines_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 2: {message}"):
        read(tmp_path, row(), row() | fields)


def test_lines_that_are_no_objects(tmp_path):
    with pytest.raises(ValueError, match="line 1: an IFEval prompt is an object, got list"):
        read(tmp_path, [])
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_ifeval(tmp_path / "broken.jsonl")
