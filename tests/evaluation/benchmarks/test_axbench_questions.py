"""AxBench's instructions, drawn for each concept."""

from __future__ import annotations

import json

import pytest

from peft_psr.evaluation.benchmarks.axbench.questions import make_trial, read_instructions
from peft_psr.training.sources.axbench import Concept, Question


def test_instructions_are_read_in_every_layout(tmp_path):
    expected = [Question("Name a bird."), Question("Why?")]
    entries = [{"instruction": " Name a bird. ", "output": "Owl"}, {"instruction": "Why?"}, {"instruction": "Why?"}]
    files = {
        "a.json": json.dumps(entries),
        "b.json": json.dumps(["Name a bird.", "Why?"]),
        "c.jsonl": "\n".join(map(json.dumps, entries)) + "\n\n",
        "d.txt": "Name a bird.\n\n  Why?\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert read_instructions(tmp_path / name) == expected
    for name, content, message in [
        ("a.json", "{}", "must hold a list of instructions, got dict"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.json", '["x", {"input": "y"}]', "a.json, entry 1 must be a text or an object"),
        ("c.jsonl", '"x"\n{', "c.jsonl, line 2 is not JSON"),
        ("c.jsonl", '"x"\n{"instruction": " "}', "c.jsonl, line 2 must be"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_instructions(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="questions_data: no file"):
        read_instructions(tmp_path / "nowhere.txt")


def test_a_trial_is_of_the_concepts_genre_held_out_and_the_same_again():
    concept = Concept(3, "loops", ("code",), ("c0", "c1 "), ("", ""))
    asked = [Question(f"{genre[0]}{i}", genre) for genre in ("code", "text") for i in range(8)] + [Question("any")]
    trial = make_trial(concept, asked, 7, seed=0)
    drawn = [*trial.choosing, *trial.scoring]
    assert sorted(drawn) == sorted([*(f"c{i}" for i in range(2, 8)), "any"])
    assert (len(trial.choosing), len(trial.scoring)) == (3, 4)
    assert make_trial(concept, asked, 7, seed=0) == trial != make_trial(concept, asked, 7, seed=1)
    anything = [make_trial(Concept(number, "x", (), (), ()), asked, 17, seed=0) for number in (3, 4)]
    assert anything[0].scoring != anything[1].scoring  # each concept draws its own
    assert all(len({*some.choosing, *some.scoring}) == 17 for some in anything)
    with pytest.raises(ValueError, match="Concept 3 is to be tried on 8 instructions, and only 7 of 17 fit it"):
        make_trial(concept, asked, 8, seed=0)
