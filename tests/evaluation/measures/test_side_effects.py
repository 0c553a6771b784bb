"""Side effects against plain computations row by row, and ranges on curves known in advance."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.adapters import steered_model
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import USER, triplets

from peft_psr.evaluation import neutral_kl, neutral_triplets, text_perplexity, text_triplets
from peft_psr.evaluation.measures.side_effects import kl_by_row, losses_by_row
from peft_psr.training import TripletCollator, sample_completions


def naive_log_probs(model, triplet, alpha, positions="response"):
    """{branch: log-probabilities (response, vocabulary)} and the response's tokens, of one triplet by itself."""
    base, row = tiny_model(), TripletCollator(tiny_tokenizer(), positions, alpha).encode(triplet)
    ids, prompted = torch.tensor([row["input_ids"]]), torch.tensor([row["teacher_input_ids"]])
    n = ids.shape[1] - row["prompt_length"]
    mask = torch.zeros_like(ids)
    mask[0, -row["mask_length"] :] = 1
    with torch.no_grad():
        logits = {
            "base": base(ids).logits,
            "steered": model(ids, steering_mask=mask, alpha=alpha).logits,
            "prompted": base(prompted).logits,
        }
    return {name: value[0, -n - 1 : -1].log_softmax(-1) for name, value in logits.items()}, ids[0, -n:]


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
def test_neutral_kl_worked_out_row_by_row(positions):
    model = steered_model(positions=positions)
    totals, tokens = {"steered": 0.0, "prompted": 0.0}, 0
    for triplet in triplets():
        found, ids = naive_log_probs(model, triplet, 0.5, positions)
        tokens += len(ids)
        for name in totals:
            totals[name] += (found["base"].exp() * (found["base"] - found[name])).sum().item()
    result = neutral_kl(model, triplets(), tiny_tokenizer(), alpha=0.5, batch_size=3)
    assert result.tokens == tokens and result.responses == len(triplets())
    assert result.steered == pytest.approx(totals["steered"] / tokens, rel=1e-4) and result.steered > 1e-3
    assert result.prompted == pytest.approx(totals["prompted"] / tokens, rel=1e-4) and result.prompted > 1e-3


def test_rows_of_a_batch_as_each_by_itself():
    model, tokenizer = steered_model(), tiny_tokenizer()
    kl, lengths = kl_by_row(model, triplets(), tokenizer, 0.5, batch_size=2)
    losses, same_lengths = losses_by_row(model, triplets(), tokenizer, 0.5, batch_size=2)
    assert lengths == same_lengths and len(set(lengths)) > 1
    for i, triplet in enumerate(triplets()):
        found, ids = naive_log_probs(model, triplet, 0.5)
        assert lengths[i] == len(ids)
        for branch, name in {"student": "steered", "teacher": "prompted"}.items():
            expected = (found["base"].exp() * (found["base"] - found[name])).sum().item()
            assert kl[branch][i] == pytest.approx(expected, rel=1e-4)
            loss = -found[name][torch.arange(len(ids)), ids].sum().item()
            assert losses[branch][i] == pytest.approx(loss, rel=1e-4)


def test_perplexity_worked_out_row_by_row():
    model = steered_model()
    totals, tokens = {"base": 0.0, "steered": 0.0, "prompted": 0.0}, 0
    for triplet in triplets():
        found, ids = naive_log_probs(model, triplet, 0.5)
        tokens += len(ids)
        for name in totals:
            totals[name] -= found[name][torch.arange(len(ids)), ids].sum().item()
    result = text_perplexity(model, triplets(), tiny_tokenizer(), alpha=0.5, batch_size=3)
    assert result.tokens == tokens
    for name, total in totals.items():
        assert getattr(result, name) == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert len({result.base, result.steered, result.prompted}) == 3


def test_nothing_done_is_no_side_effect():
    model, tokenizer = steered_model(), tiny_tokenizer()
    off = neutral_kl(model, triplets(), tokenizer, alpha=0.0)
    assert off.steered == pytest.approx(0.0, abs=1e-6) and off.prompted > 1e-3
    unprompted = neutral_kl(model, triplets(instruction=""), tokenizer)
    assert unprompted.prompted == pytest.approx(0.0, abs=1e-6) and unprompted.steered > 1e-3
    text = text_perplexity(model, triplets(instruction=""), tokenizer, alpha=0.0)
    assert text.steered == pytest.approx(text.base, rel=1e-5) and text.prompted == pytest.approx(text.base, rel=1e-5)


def test_neutral_answers_are_the_base_models():
    model, tokenizer = steered_model(), tiny_tokenizer()
    prompts = [[USER], [{"role": "user", "content": "what are dogs"}]]
    settings = {"max_new_tokens": 6, "seed": 4}
    instructed = [("be brief", prompt) for prompt in prompts] + [("be good", prompt) for prompt in prompts]
    answers = [answer.text for answer in sample_completions(tiny_model(), tokenizer, prompts * 2, **settings)]
    steered = [answer.text for answer in sample_completions(model, tokenizer, prompts * 2, **settings)]
    expected = [(*pair, answer) for pair, answer in zip(instructed, answers, strict=True) if answer]
    assert answers != steered and 0 < len(expected) < 4  # empty ones are left out
    rows = neutral_triplets(model, tokenizer, prompts, instructions=["be brief", "be good"], **settings)
    assert [(row["steered_prompt"][0]["content"], row["prompt"], row["completion"]) for row in rows] == expected
    assert all(row["steered_prompt"][1:] == row["prompt"] and row["truncated"] for row in rows)
    for row in neutral_triplets(model, tokenizer, prompts, **settings):
        assert row["steered_prompt"] == row["prompt"]
    with pytest.raises(ValueError, match="at least one of its `prompts`"):
        neutral_triplets(model, tokenizer, [], max_new_tokens=6)


def test_plain_texts_are_split_into_context_and_rest():
    (row,) = text_triplets(["tea is good now yes"], "be brief")
    assert row == {"prompt": "tea is", "steered_prompt": "be brief\n\ntea is", "completion": " good now yes"}
    assert text_perplexity(steered_model(), [row], tiny_tokenizer()).tokens == 3
    with pytest.raises(ValueError, match=r"texts\[1\] has fewer than two words: 'tea'"):
        text_triplets(["tea is", "tea"])
