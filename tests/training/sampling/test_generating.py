"""Rows that have ended are not carried on with, and the others are none the wiser."""

from __future__ import annotations

import pytest
from helpers.adapters import steered_model
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer

from peft_psr.training import sample_completions
from peft_psr.training.sampling import generating


PROMPTS = [[{"role": "user", "content": text}] for text in ("what is tea", "tea", "a b c d", "yes", "what is")] * 2


def drawn(model, monkeypatch, stretch, **settings):
    """The completions' ids, and the (rows, tokens) of each forward call."""
    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(generating, "STRETCH", stretch)
    completions = sample_completions(model, tiny_tokenizer(), PROMPTS, max_new_tokens=40, seed=3, **settings)
    handle.remove()
    return [completion.ids for completion in completions], calls


@pytest.mark.parametrize("positions", [None, "response", "question_and_response", "all"])
def test_rows_that_ended_are_left_behind(positions, monkeypatch):
    model = tiny_model() if positions is None else steered_model(positions=positions)
    settings = {} if positions is None else {"alpha": [0.1 * i for i in range(len(PROMPTS))]}
    inner = model if positions is None else model.get_base_model()
    inner.generation_config.eos_token_id = list(range(8))  # so that rows end, at different times
    whole, calls = drawn(inner if positions is None else model, monkeypatch, 1000, **settings)
    in_stretches, fewer = drawn(inner if positions is None else model, monkeypatch, 5, **settings)
    assert in_stretches == whole
    assert len({len(ids) for ids in whole}) > 2
    if positions is None:
        assert len(fewer) == len(calls) and sum(rows for rows, _ in fewer) < sum(rows for rows, _ in calls)


def test_a_model_without_a_plain_cache_is_not_interrupted():
    model = tiny_model()
    assert generating.can_be_interrupted(model)
    model.generation_config.use_cache = False
    assert not generating.can_be_interrupted(model)
