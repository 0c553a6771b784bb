"""A tiny base model, its triplets and recipes on them, for runs of `psr train`."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer
from tiny_triplets import add_instruction

from peft_psr.training.train_recipe import TrainRecipe


PROMPTS = ["what is tea", "are dogs good", "what are dogs", "is tea good", "what is good"]
INSTRUCTIONS = {"brief": "be brief", "kind": "dogs are good"}
COMPLETIONS = ["tea is good", "a b c d e", "yes"]
STOPS_EARLY = {
    "traits": "kind",
    "epochs": 20,
    "learning_rate": 0.3,
    "gate": "constant",
    "eval_share": 0.2,
    "early_stopping": 2,
}


def rows(about, prompts=PROMPTS, completions=COMPLETIONS, **fields):
    return [
        {
            "trait": about,
            "prompt": [{"role": "user", "content": prompt}],
            "steered_prompt": add_instruction([{"role": "user", "content": prompt}], INSTRUCTIONS[about]),
            "completion": completion,
            "trait_score": 80.0,
            "model": "base",
            **fields,
        }
        for prompt in prompts
        for completion in completions
    ]


def write(path, *triplets):
    path.write_text("".join(json.dumps(row) + "\n" for row in triplets))
    return path


def make_files(folder):
    """A base model and 15 triplets for each of two traits."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write(folder / "triplets.jsonl", *rows("brief"), *rows("kind"))
    return folder


def make_recipe(made, **fields):
    settings = {
        "model": str(made / "base"),
        "triplets": str(made / "triplets.jsonl"),
        "triplets_model": "base",
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
    }
    return TrainRecipe(**{**settings, **fields})


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(first, second, traits=("brief", "kind"), atol=1e-6):
    for trait in traits:
        one, other = weights(first / trait), weights(second / trait)
        assert set(one) == set(other)
        for name, values in one.items():
            torch.testing.assert_close(values, other[name], atol=atol, rtol=0)
