"""An AxBench data set for the embedded model, a recipe of `psr evaluate axbench` on it, and a judge by rule."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from helpers.unruly_server import MODEL
from peft_psr.evaluation.benchmarks.axbench.recipe import AxBenchRecipe
from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
from peft_psr.tiny_chat import questions


pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write_data(folder):
    """A data set in the Hub's layout: two concepts, the embedded model's questions."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [question.text for question in questions("train")]
    concepts = {0: "mentions of tea", 3: "words such as good"}
    rows = []
    for place, (concept, description) in enumerate(concepts.items()):
        for number in range(4):
            text = f"I like {description.split()[-1]} . That is good ."
            rows.append((asked[4 * place + number], text, "positive", concept, "text"))
    rows += [(text, "I see .", "negative", -1, "text" if i % 2 else "code") for i, text in enumerate(asked)]
    names = ("input", "output", "category", "concept_id", "concept_genre")
    table = pyarrow.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
    parquet.write_table(table, folder / "train.parquet")
    lines = [
        {"concept_id": concept, "concept": text, "concept_genres_map": {text: ["text"]}}
        for concept, text in concepts.items()
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe_in(folder, **options):
    settings = {
        "models": "embedded", "data": str(write_data(folder / "data")), "judge": "server", "judge_model": MODEL,
        "judge_url": "http://127.0.0.1:9/v1", "methods": "S-Const DiM", "own_answers": True, "test_instructions": 4,
        "factors": "40,8", "max_new_tokens": 8,
    }  # fmt: skip
    return load_evaluate_recipe(AxBenchRecipe, None, settings | options)


def what_was_asked(body):
    """(rating, {tag: what it holds}) of a judge's question."""
    text = body["messages"][0]["content"]
    parts = dict(re.findall(r"<(concept|instruction|text)>\n(.*?)\n</\1>", text, re.DOTALL))
    return next((name for name in ("concept", "instruction") if name in parts), "fluency"), parts


def by_rule(body):
    """A judge: the concept by how often its last word comes, the rest by a hash; some replies in another form."""
    name, parts = what_was_asked(body)
    number = int(hashlib.sha256(json.dumps([name, parts]).encode()).hexdigest(), 16)
    rating = min(2, parts["text"].count(parts["concept"].split()[-1])) if name == "concept" else 1 + number % 2
    return f"I see.\nRating: {rating}" if number % 11 == 0 else f"I see.\nRating: [[{rating}]]"
