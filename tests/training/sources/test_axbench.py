"""AxBench: its files read, prompts and triplets made of them.

Real files are read where PSR_TEST_DATA names a folder that holds `axbench/`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.tokenizers import tiny_tokenizer

from peft_psr.training import TripletCollator
from peft_psr.training.sources.axbench import (
    Question,
    axbench_pairs,
    axbench_triplets,
    read_axbench,
    read_negative_questions,
)


pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
REAL_DATA = Path(os.environ.get("PSR_TEST_DATA", "")) / "axbench"

CONCEPTS = [
    {"concept_id": 0, "concept": "words of the sea", "concept_genres_map": {"words of the sea": ["text"]}},
    {"concept_id": 3, "concept": "loops in C", "ref": "somewhere", "concept_genres_map": {"loops in C": ["code"]}},
]


def example(concept_id, number, category="positive", **fields):
    return {
        "input": f"Question {number}?",
        "output": f" Answer {number} with concept {concept_id}",
        "output_concept": "EEEEE",
        "concept_genre": "text",
        "category": category,
        "dataset_category": "instruction",
        "concept_id": concept_id,
        **fields,
    }


ROWS = [example(-1, 8, "negative"), example(3, 9, "negative"), example(3, 0), example(0, 1), example(3, 2)]


def write(folder, rows=ROWS, concepts=CONCEPTS, name="v1."):
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}train.parquet")
    (folder / f"{name}metadata.jsonl").write_text("".join(json.dumps(c) + "\n" for c in concepts))
    return folder


def test_concepts_hold_their_positive_examples(tmp_path):
    sea, loops = read_axbench(write(tmp_path))
    assert (sea.id, sea.description, sea.genres, sea.inputs) == (0, "words of the sea", ("text",), ("Question 1?",))
    assert (loops.id, loops.genres, loops.inputs) == (3, ("code",), ("Question 0?", "Question 2?"))
    assert loops.outputs == ("Answer 0 with concept 3", "Answer 2 with concept 3")
    assert read_axbench(tmp_path, [3]) == [loops] and read_axbench(tmp_path, [3, 0]) == [loops, sea]


def test_the_layout_of_the_hub(tmp_path):
    write(tmp_path / "2b" / "l20" / "train", name="")
    (tmp_path / "2b" / "l20" / "test").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "2b" / "l20" / "test" / "data.parquet")
    assert len(read_axbench(tmp_path)) == 2
    write(tmp_path / "9b" / "l20" / "train", name="")
    with pytest.raises(ValueError, match=r"several \*train\*.parquet: 2b/l20/train/train.parquet, 9b"):
        read_axbench(tmp_path)
    assert len(read_axbench(tmp_path / "9b")) == 2


def test_pairs(tmp_path):
    loops = read_axbench(write(tmp_path), [3])[0]
    first, second = axbench_pairs(loops)
    assert (first.id, second.id, first.trait, first.negative) == ("axbench/3/0", "axbench/3/1", "loops in C", False)
    assert first.prompt == [{"role": "user", "content": "Question 0?"}]
    assert first.steered_prompt[0]["role"] == "system" and "loops in C" in first.steered_prompt[0]["content"]
    assert first.metadata == {"concept_id": 3, "question": "Question 0?"}
    other = axbench_pairs(loops, "after", "Mention {concept}.")[1]
    assert other.steered_prompt == [{"role": "user", "content": "Question 2?\n\nMention loops in C."}]
    with pytest.raises(ValueError, match="placeholder {concept}, got 'Mention it.'"):
        axbench_pairs(loops, instruction="Mention it.")


def test_triplets_can_be_trained_on(tmp_path):
    loops = read_axbench(write(tmp_path), [3])[0]
    triplets = axbench_triplets(loops, "before")
    assert [t["completion"] for t in triplets] == list(loops.outputs)
    assert [t["steered_prompt"] for t in triplets] == [p.steered_prompt for p in axbench_pairs(loops, "before")]
    tokenizer = tiny_tokenizer()
    batch = TripletCollator(tokenizer, alpha=1.0)(triplets)
    assert tokenizer.eos_token_id not in batch["labels"].tolist()[0]  # nobody knows whether the answer ended
    with pytest.raises(ValueError, match="give alpha as a number"):
        TripletCollator(tokenizer)(triplets)


def test_questions_of_the_shared_negatives(tmp_path):
    rows = [
        *ROWS,
        example(-1, 8, "negative", concept_genre="code"),  # again
        example(-1, 9, "negative", input=" Question 9? ", concept_genre="code"),
        example(-1, 7, "positive"),
    ]
    found = read_negative_questions(write(tmp_path, rows))
    assert found == [Question("Question 8?", "text"), Question("Question 9?", "code")]
    short = [{name: row[name] for name in ("input", "output", "category", "concept_id")} for row in rows]
    assert read_negative_questions(write(tmp_path, short)) == [Question("Question 8?"), Question("Question 9?")]
    with pytest.raises(ValueError, match="train.parquet, row 5: input must not be empty"):
        read_negative_questions(write(tmp_path, [*ROWS, example(-1, 1, "negative", input=" ")]))
    with pytest.raises(FileNotFoundError, match="No folder"):
        read_negative_questions(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concepts": [{"concept": "a"}]}, "metadata.jsonl, line 1 must be an object with concept_id and concept"),
        ({"concepts": [[]]}, "metadata.jsonl, line 1 must be an object"),
        ({"concepts": [{"concept_id": "0", "concept": "a"}]}, "line 1: concept_id must be a whole number"),
        ({"concepts": [CONCEPTS[0]] * 2}, "line 2: concept_id 0 comes twice"),
        (
            {"rows": [{"input": "a", "output": "b"}]},
            "train.parquet lacks the column category, concept_id; it has input",
        ),
        ({"rows": [*ROWS, example(0, 5, output="")]}, "train.parquet, row 5: input and output must not be empty"),
        ({"rows": ROWS[:3]}, "no positive example of concept 0"),
        ({"concepts": []}, "metadata.jsonl holds no concepts"),
        (
            {"concepts": [{**CONCEPTS[0], "concept_genres_map": {CONCEPTS[0]["concept"]: "text"}}]},
            "line 1: concept_genres_map must give a list of texts for the concept, got 'text'",
        ),
        ({"rows": [{**example(0, 5), "input": ["a"]}]}, r"train.parquet, row 0: input must be text, got \['a'\]"),
    ],
)
def test_malformed_files_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_axbench(write(tmp_path, **settings))


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder"):
        read_axbench(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no \*train\*.parquet"):
        read_axbench(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="has no concept 1, 2; it has 0, 3"):
        read_axbench(tmp_path, [0, 1, 2])
    (tmp_path / "v1.train.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="train.parquet is not a parquet file"):
        read_axbench(tmp_path)
    (tmp_path / "v1.metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match="metadata.jsonl, line 1 is not JSON"):
        read_axbench(tmp_path)
    (tmp_path / "v1.metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*metadata.jsonl"):
        read_axbench(tmp_path)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="PSR_TEST_DATA names no folder with axbench/")
def test_real_files():
    concepts = read_axbench(REAL_DATA)
    table = parquet.read_table(next(REAL_DATA.glob("*train.parquet")))
    positives = table["category"].to_pylist().count("positive")
    assert sum(len(concept.inputs) for concept in concepts) == positives > 0
    for concept in concepts:
        pairs, triplets = axbench_pairs(concept), axbench_triplets(concept)
        assert len({pair.id for pair in pairs}) == len(pairs) == len(triplets) == len(concept.outputs)
        assert all(concept.description in pair.steered_prompt[0]["content"] for pair in pairs)
    questions = read_negative_questions(REAL_DATA)
    assert {question.genre for question in questions} == {"text", "code", "math"}
    # some of them are questions that adapters are trained on
    assert {question.text for question in questions} & {text for concept in concepts for text in concept.inputs}
