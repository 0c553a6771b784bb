"""A call's cache is found by the name that either version of transformers gives it."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model
from transformers import DynamicCache

from peft_psr.base_model.caches import CACHE_NAMES, cache_name, cache_of
from peft_psr.call_state import Generation, SteeringState, cache_length, token_mask


IDS = torch.tensor([[1, 9, 12, 17]])


def filled(tokens):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2), 0)
    return cache


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_step_is_told_from_another_call_by_its_cache(name):
    state = SteeringState({"response"}, generation=Generation(torch.ones_like(IDS), None))
    prompt = [[False, False, False, True]]
    state.begin_call({"input_ids": IDS, name: DynamicCache()})
    assert state.masks["response"].tolist() == prompt
    state.begin_call({"input_ids": IDS})  # a logits processor calls the model
    assert state.masks["response"].tolist() == prompt
    state.begin_call({"input_ids": IDS[:, :2], name: filled(4)})
    assert state.masks["response"] is None


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_continued_cache_counts(name):
    assert cache_length({name: filled(3), "use_cache": True}) == 3
    assert cache_length({"use_cache": True}) == 0
    ahead = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0]])  # a cache of fixed size: its mask goes on beyond the tokens
    mask = token_mask({"attention_mask": ahead, name: filled(2)}, 1, 4, IDS.device)
    assert mask.tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generation_goes_on_from_a_cache_of_part_of_the_prompt(name):
    state = SteeringState({"response"}, generation=Generation(torch.ones_like(IDS), None))
    state.begin_call({"input_ids": IDS[:, 2:], name: filled(2)})
    assert state.masks["response"].tolist() == [[False, True]]


def test_the_models_own_name_is_the_one_that_its_forward_takes():
    model = tiny_model()
    name = cache_name(model.forward)
    output = model(input_ids=IDS, use_cache=True)
    assert cache_length({name: cache_of(output)}) == 4
    torch.testing.assert_close(
        model(input_ids=IDS[:, :1], **{name: cache_of(output)}).logits[:, -1],
        model(input_ids=torch.cat([IDS, IDS[:, :1]], dim=1)).logits[:, -1],
    )
