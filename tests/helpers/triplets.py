"""Triplets for `tokenizers.tiny_tokenizer`."""

from __future__ import annotations

from peft_psr.training import add_instruction


USER = {"role": "user", "content": "what is tea"}
COMPLETIONS = ["tea is good", "a b c d e", "dogs are good now", "yes"]


def triplets(instruction="be brief", completions=COMPLETIONS, **fields):
    return [
        {
            "prompt": [USER],
            "steered_prompt": add_instruction([USER], instruction),
            "completion": completion,
            "trait_score": 80.0,
            "coherence_score": 90.0,
            **fields,
        }
        for completion in completions
    ]


SIX = triplets(completions=[*COMPLETIONS, "dogs dogs", "tea now"])
