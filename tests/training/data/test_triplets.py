"""Triplets: sampled, judged, filtered, written and read; encoded and collated for both branches."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import USER, triplets

from peft_psr.training import (
    TripletCollator,
    add_instruction,
    filter_triplets,
    generate_triplets,
    read_triplets,
    sample_completions,
    write_triplets,
)
from peft_psr.training.judges.base import JudgeScores


class LengthJudge:
    """Trait: 100 for an even number of words; no verdict on an empty completion."""

    def __init__(self):
        self.prompts = []

    def __call__(self, prompts, completions):
        self.prompts += prompts
        return [
            JudgeScores(None, None) if not text else JudgeScores(100.0 * (len(text.split()) % 2 == 0), 100.0)
            for text in completions
        ]


def test_generate_triplets():
    model, tokenizer, judge = (
        tiny_model(),
        tiny_tokenizer("what is tea be brief now " + " ".join(map(str, range(51)))),
        LengthJudge(),
    )
    settings = {"num_draws": 3, "max_new_tokens": 6, "batch_size": 4, "progress": False}
    made = generate_triplets(model, tokenizer, ["be brief", "now"], [[USER]], judge, seed=1, **settings)
    assert len(made) == 6
    assert made[0]["prompt"] == [USER] and made[-1]["steered_prompt"][0] == {"role": "system", "content": "now"}
    assert all(prompt == [USER] for prompt in judge.prompts)  # judged against the bare prompt
    state = torch.get_rng_state()
    assert made == generate_triplets(model, tokenizer, ["be brief", "now"], [[USER]], judge, seed=1, **settings)
    assert torch.equal(state, torch.get_rng_state())
    assert made != generate_triplets(model, tokenizer, ["be brief", "now"], [[USER]], judge, seed=2, **settings)


def test_sampling_stops_at_the_end_of_the_turn_and_keeps_order():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [[USER], add_instruction([USER], "be brief"), [USER]]
    together = sample_completions(model, tokenizer, prompts, max_new_tokens=5, temperature=0, batch_size=2)
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion == sample_completions(model, tokenizer, [prompt], max_new_tokens=5, temperature=0)[0]
    assert together[0] == together[2]


def test_filter():
    def row(trait, coherence, completion="yes"):
        return {"prompt": [USER], "steered_prompt": [USER], "completion": completion, "trait_score": trait,
                "coherence_score": coherence}  # fmt: skip

    rows = [row(90, 90), row(49, 90), row(90, 49), row(None, 90), row(90, None), row(50, 50), row(90, 90, "")]
    assert filter_triplets(rows) == [rows[0], rows[5]]
    assert filter_triplets(rows, keep_negatives=True) == [rows[0], rows[1], rows[5]]
    with pytest.raises(ValueError, match="None of 1 triplets"):
        filter_triplets([row(0, 0)])
    with pytest.raises(ValueError, match="between 0 and 100, got 150"):
        filter_triplets(rows, min_trait_score=150)


def test_files(tmp_path):
    path = tmp_path / "triplets.jsonl"
    write_triplets(triplets(), path)
    assert read_triplets(path) == triplets() and list(tmp_path.iterdir()) == [path]
    path.write_text("")
    with pytest.raises(ValueError, match="holds no triplets"):
        read_triplets(path)
    path.write_text('{"prompt": "a", "steered_prompt": "b", "completion": "c"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 2: steered_prompt, completion missing"):
        read_triplets(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_triplets(path)


# ---------------------------------------------------------------- the collator


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
def test_both_masks_name_the_same_tokens(positions):
    batch = TripletCollator(tiny_tokenizer(), positions)(triplets())
    student = batch["input_ids"][batch["steering_mask"].bool()]
    teacher = batch["teacher_input_ids"][batch["teacher_mask"].bool()]
    assert torch.equal(student, teacher)
    tokenizer = tiny_tokenizer()
    labels = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.convert_ids_to_tokens(labels) == ["tea", "is", "good", "</t>"]
    assert torch.allclose(batch["alpha"], torch.tensor(0.8))


def test_completion_with_other_tokens_in_each_branch():
    class Moody:
        """Tokenizes the last word by the number of words before it, as a merging tokenizer may."""

        chat_template, pad_token_id, eos_token_id, name_or_path = None, 0, None, "moody"

        def __call__(self, text, add_special_tokens=True):
            words = text.split()
            return {"input_ids": [5] * (len(words) - 1) + ([len(words)] if text[-1] != " " else [5])}

    triplet = {"prompt": "a ", "steered_prompt": "a b ", "completion": "c", "trait_score": 90}
    with pytest.raises(ValueError, match="tokenises differently"):
        TripletCollator(Moody()).encode(triplet)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"completion": 3}, "completion must be text"),
        ({"prompt": {"role": "user"}}, "prompt must be text or messages"),
        ({"trait_score": 101}, "trait_score must be 0-100"),
    ],
)
def test_malformed_triplets_are_named(fields, message):
    with pytest.raises(ValueError, match=f"row 7: {message}"):
        TripletCollator(tiny_tokenizer()).encode(triplets(**fields)[0] | fields, "row 7")


def test_question_that_differs_between_branches_is_refused():
    triplet = {**triplets()[0], "steered_prompt": [{"role": "user", "content": "be brief what is dogs"}]}
    with pytest.raises(ValueError, match="question's tokens differ"):
        TripletCollator(tiny_tokenizer(), "question_and_response").encode(triplet)
    TripletCollator(tiny_tokenizer(), "response").encode(triplet)
