"""IFEval's files, line by line."""

from __future__ import annotations

import json

from peft_psr.training.sources.ifeval import read_ifeval


def row(instruction="punctuation:no_comma", kwargs=None, **fields):
    return {
        "key": 7,
        "prompt": "Describe the weather. Use no commas.",
        "prompt_without_instruction": "Describe the weather.",
        "instruction_id_list": [instruction],
        "kwargs": [kwargs or {}],
        **fields,
    }


def read(folder, *rows, **settings):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return read_ifeval(path, **settings)
