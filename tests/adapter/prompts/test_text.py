"""Files in other encodings, YAML that is ambiguous or broken: refused with the file and the line."""

from __future__ import annotations

import json

import pytest

from peft_psr.evaluation.benchmarks.axbench.questions import read_instructions
from peft_psr.text import check_unicode, composed, read_text
from peft_psr.training.runs.triplets.recipe import load_recipe
from peft_psr.training.runs.yaml_reading import read_yaml
from peft_psr.training.sources.ifeval import read_ifeval
from peft_psr.training.sources.personas import read_trait


FIRST = "a: 1\n"
OTHERS = {
    "latin": ((FIRST + "b: é\n").encode("latin-1"), r"latin, line 2 is not UTF-8: it holds the byte 0xe9"),
    "windows": ((FIRST + "b: “x”\n").encode("cp1252"), r"windows, line 2 is not UTF-8: it holds the byte 0x93"),
    "utf16": (FIRST.encode("utf-16"), r"utf16 is UTF-16 or no text at all; save it as UTF-8"),
    "utf16le": (FIRST.encode("utf-16-le"), r"utf16le is UTF-16 or no text"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("read", [read_text, read_yaml, load_recipe, read_ifeval, read_instructions])
def test_other_encodings_are_named_with_file_and_line(tmp_path, name, read):
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_trait_in_another_encoding(tmp_path):
    (tmp_path / "x.json").write_bytes('{\n"é": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x.json, line 2 is not UTF-8"):
        read_trait(tmp_path / "x.json")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\n")
    assert read_text(tmp_path / "x") == "a: é\n" and read_yaml(tmp_path / "x") == {"a": "é"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\n'a': 3\n", r"x.yaml, line 3: the key 'a' stands in line 1 too"),
        ("x:\n  a: 1\n  a: 1\n", r"x.yaml, line 3: the key 'a' stands in line 2 too"),
        ("x: {a: 1, a: 2}", r"x.yaml, line 1: the key 'a' stands in line 1 too"),
        ("a: 1\nb:\n\t- c\n", r"x.yaml is not YAML: line 3: .*a tab: YAML is indented with spaces"),
        ("a: [1\n", r"x.yaml is not YAML: line 2: "),
        ("a: 1\n---\nb: 2\n", r"x.yaml is not YAML: line 2: but found another document"),
        ("a: *b\n", r"x.yaml is not YAML: line 1: found undefined alias"),
        ("a: 2024-13-45\n", r"x.yaml holds a value that YAML can't read: month must be in 1..12. Put it in quotes"),
        ("a: \x07\n", r"x.yaml is not YAML: unacceptable character"),
    ],
)
def test_yaml_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


def test_merged_keys_may_be_given_again(tmp_path):
    (tmp_path / "x.yaml").write_text("base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  a: 3\n")
    assert read_yaml(tmp_path / "x.yaml")["mine"] == {"a": 3, "b": 2}


def test_separators_inside_json_are_no_line_ends(tmp_path):
    text = "one\u2028two\u0085three"
    row = {"prompt": text, "prompt_without_instruction": "p", "instruction_id_list": ["i"], "kwargs": [{}]}
    (tmp_path / "i.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    (pair,) = read_ifeval(tmp_path / "i.jsonl")
    assert pair.steered_prompt[0]["content"] == text
    (tmp_path / "q.jsonl").write_text(json.dumps(text, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [question.text for question in read_instructions(tmp_path / "q.jsonl")] == [text]


def test_half_a_surrogate_pair_is_named(tmp_path):
    assert check_unicode("a 🙂", "x") == "a 🙂"
    with pytest.raises(ValueError, match=r"here holds '\\ud83d' at character 3"):
        check_unicode("a \ud83d", "here")
    row = {"prompt": "a\ud83d", "prompt_without_instruction": "p", "instruction_id_list": ["i"], "kwargs": [{}]}
    (tmp_path / "i.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="line 1: prompt holds"):
        read_ifeval(tmp_path / "i.jsonl")


def test_names_have_one_form():
    assert composed("cafe\u0301") == composed("café") == "caf\u00e9"
