"""Adapters of several traits on one model answer in mixed batches as each does alone."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import several
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import LoraConfig, get_peft_model

from peft_psr import PSRConfig
from peft_psr.evaluation.measures.mixed_batches import copy_adapter, together
from peft_psr.training.data.draws import draw_seed
from peft_psr.training.sampling.local import sample_completions


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mixed_batches_answer_as_each_adapter_does_alone(temperature):
    tokenizer, source = tiny_tokenizer(), several()
    copies = {}
    for name in "abc":
        source.set_adapter(name)
        copies[f"trait_{name}"] = copy_adapter(source)
    base = tiny_model()
    ids = torch.tensor([[1, 9, 12]])
    before = base(ids).logits
    prompts = [
        [{"role": "user", "content": "what is " + word}] for word in ("tea", "a b c", "dogs", "d", "tea now", "e")
    ]
    names = ["trait_b", "trait_a", "trait_c", "__base__", "trait_a", "trait_b"]
    alphas, seeds = [0.5, 2.0, 1.0, 1.0, 0.0, -1.0], [7, 8, 9, 10, 11, 12]
    settings = {"max_new_tokens": 8, "temperature": temperature}
    with together(base, copies) as steered:
        mixed = sample_completions(
            steered, tokenizer, prompts, **settings, batch_size=4, alpha=alphas, adapter_names=names, seeds=seeds
        )
    assert torch.equal(base(ids).logits, before) and not hasattr(base, "peft_config")
    for prompt, name, alpha, seed, got in zip(prompts, names, alphas, seeds, mixed, strict=True):
        if name == "__base__":
            (alone,) = sample_completions(base, tokenizer, [prompt], **settings, seeds=[seed])
        else:
            source.set_adapter(name[-1])
            (alone,) = sample_completions(source, tokenizer, [prompt], **settings, alpha=[alpha], seeds=[seed])
        assert got == alone
    assert len({completion.text for completion in mixed}) > 3


def test_seeds_and_strengths_are_one_for_each_prompt():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    prompts = [[{"role": "user", "content": "what is tea"}]] * 2
    settings = {"max_new_tokens": 6, "batch_size": 1}
    seeds = [draw_seed(5, f"prompt/{i}") for i in range(2)]
    drawn = sample_completions(model, tokenizer, prompts, **settings, seeds=seeds)
    assert drawn == sample_completions(model, tokenizer, prompts, **settings, seed=5)
    assert drawn[::-1] == sample_completions(model, tokenizer, prompts, **settings, seeds=seeds[::-1])
    for name in ("alpha", "adapter_names", "seeds"):
        with pytest.raises(ValueError, match=f"{name} must hold one for each of the 2 prompts, got 1"):
            sample_completions(model, tokenizer, prompts, **settings, **{name: [1]})


def test_what_is_no_single_psr_adapter_is_not_copied():
    model = several()
    model.base_model.set_adapter(["a", "b"])
    assert copy_adapter(model) is None
    assert copy_adapter(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))) is None
    one = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=0))
    with (
        pytest.raises(ValueError, match="'x' does not fit the model"),
        together(tiny_model("gpt2"), {"x": copy_adapter(one)}),
    ):
        pass
