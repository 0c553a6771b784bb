"""Local sampling: the right distribution, by each draw's own seed, in any batch, also when memory runs out."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast, set_seed

from peft_psr import PSRConfig
from peft_psr.training import LocalSampler, sample_completions
from peft_psr.training.data.draws import Completion, PromptPair, draw_seed, draws_on, template_hash
from peft_psr.training.sampling.gumbel import GumbelLogitsProcessor, gumbel_noise


WORDS = " ".join(f"w{i}" for i in range(57))  # with the special tokens, every token of the tiny models
QUESTIONS = ["w1", "w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w2 w3", "w5"]


def tokenizer():
    return tiny_tokenizer(WORDS)


def draws(count=3):
    pairs = [
        PromptPair(f"trait/{i}", "trait", [{"role": "user", "content": text}], [{"role": "user", "content": text}])
        for i, text in enumerate(QUESTIONS)
    ]
    return [draw for pair in pairs for draw in draws_on(pair, count, run_seed=5)]


def sampler(model=None, **settings):
    return LocalSampler(model or tiny_model(), tokenizer(), **{"max_new_tokens": 8, "batch_size": 64} | settings)


def texts(outcomes):
    return {draw.id: sample for draw, sample in outcomes}


def p_value(observed, probabilities):
    """Pearson's chi-square test that counts come from these probabilities; rare outcomes are pooled."""
    expected = probabilities.double() * observed.sum()
    rare = expected < 10
    observed = torch.cat([observed[~rare], observed[rare].sum(0, keepdim=True)]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.double), statistic / 2).item()


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("step", [0, 3])
def test_draws_come_from_the_softmax(temperature, step):
    rows, logits = 20_000, torch.randn(24, generator=torch.Generator().manual_seed(1)) * 2
    seeds = [draw_seed(0, f"{step}/{i}") for i in range(rows)]
    processor = GumbelLogitsProcessor(seeds, prompt_length=7, temperature=temperature, device="cpu")
    drawn = processor(torch.zeros(rows, 7 + step, dtype=torch.long), logits.expand(rows, -1)).argmax(-1)
    assert p_value(torch.bincount(drawn, minlength=24), torch.softmax(logits / temperature, -1)) > 1e-3
    other = torch.softmax(logits / temperature * 1.1, -1)
    assert p_value(torch.bincount(drawn, minlength=24), other) < 1e-3  # the test can tell


def test_noise_is_gumbel_also_in_its_tails():
    noise = gumbel_noise(torch.arange(64), 0, 1 << 15).flatten().double()
    assert noise.isfinite().all()
    for threshold in (-2.0, 0.0, 3.0, 9.0, 12.0):
        share = -torch.expm1(-torch.exp(torch.tensor(-threshold, dtype=torch.double)))
        count, expected = (noise > threshold).sum(), share * len(noise)
        assert abs(count - expected) < 4 * torch.sqrt(expected * (1 - share)) + 1
    assert noise.max() > 12.5  # 2 million of them: with probability 1 - e^-7.8


def test_noise_differs_between_seeds_and_steps_and_is_uncorrelated():
    kinds = torch.stack([gumbel_noise(torch.tensor([seed]), step, 4096)[0] for seed in (1, 2, 3) for step in (0, 1)])
    correlations = torch.corrcoef(kinds) - torch.eye(len(kinds))
    assert correlations.abs().max() < 5 / 64
    assert torch.equal(gumbel_noise(torch.tensor([9, 1]), 0, 4096)[1], kinds[0])  # the row's place does not matter
    assert torch.equal(gumbel_noise(torch.tensor([1]), 0, 7)[0], kinds[0, :7])


def test_a_model_is_sampled_from_its_own_distribution():
    model = tiny_model()
    model.generation_config.update(top_k=2, top_p=0.1, repetition_penalty=5.0, temperature=0.1)
    prompt, rows = [{"role": "user", "content": "w1 w2"}], 4000
    with torch.no_grad():
        ids = tokenizer().apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        probabilities = torch.softmax(model(**ids).logits[0, -1], -1)
    first = {token: i for token, i in tokenizer().get_vocab().items() if i > 6}
    made = sample_completions(model, tokenizer(), [prompt] * rows, max_new_tokens=1, batch_size=1000)
    counts = torch.zeros(len(probabilities), dtype=torch.long)
    for completion in made:
        counts[first.get(completion.text, 0)] += 1
    special = probabilities[:7].sum()  # special tokens leave no text
    probabilities = torch.cat([special[None], torch.zeros(6), probabilities[7:]])
    assert p_value(counts, probabilities) > 1e-3


# ---------------------------------------------------------------- seeds and batches


def test_a_draw_is_the_same_alone_and_in_any_batch():
    every = draws()
    together = texts(sampler()(every))
    assert len({sample.text for sample in together.values()}) > len(QUESTIONS)  # draws of one prompt differ
    assert texts(sampler(batch_size=4)(every)) == together
    assert texts(sampler()(every[::-1])) == together
    for draw in every[:6]:
        assert texts(sampler()([draw])) == {draw.id: together[draw.id]}


def test_global_random_state_is_neither_used_nor_changed():
    set_seed(1)
    first = texts(sampler()(draws()))
    state = torch.get_rng_state()
    assert texts(sampler()(draws())) == first
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_follow_the_run_and_the_id():
    assert draw_seed(0, "a/0") == 1746515184 and 0 <= draw_seed(1, "a/0") < 1 << 31
    assert len({draw.seed for draw in draws(10)}) == 50
    assert [draw.id for draw in draws()[:3]] == ["trait/0/0", "trait/0/1", "trait/0/2"]


def test_tokens_are_counted_and_the_limit_shows():
    made = texts(sampler(max_new_tokens=8)(draws(20)))
    lengths = {sample.completion_tokens for sample in made.values()}
    assert all(sample.completion_tokens == 8 for sample in made.values() if sample.truncated)
    assert any(not sample.truncated for sample in made.values()) and max(lengths) == 8
    assert made["trait/1/0"].prompt_tokens == made["trait/0/0"].prompt_tokens + 2
    assert isinstance(made["trait/1/0"], Completion)


def test_temperature_zero_is_greedy():
    made = texts(sampler(temperature=0)(draws()))
    assert all(made[f"trait/{i}/0"] == made[f"trait/{i}/2"] for i in range(len(QUESTIONS)))


# ---------------------------------------------------------------- memory and devices


class SmallMemory:
    """Runs out of memory above a batch size, part of the way through a completion."""

    def __init__(self, model, most):
        self.most, self.sizes, forward = most, [], model.forward

        def limited(*args, input_ids, **kwargs):
            self.sizes.append(len(input_ids))
            if len(input_ids) > most and input_ids.shape[1] == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return forward(*args, input_ids=input_ids, **kwargs)

        model.forward = limited


def test_out_of_memory_halves_the_batch_and_changes_nothing():
    expected = texts(sampler()(draws()))
    model = tiny_model()
    memory = SmallMemory(model, most=3)
    assert texts(sampler(model, batch_size=12)(draws())) == expected
    assert sorted(set(memory.sizes)) == [3, 6, 12]
    assert memory.sizes.index(6) < memory.sizes.index(3) and 6 not in memory.sizes[memory.sizes.index(3) :]


def test_a_single_draw_that_does_not_fit_is_an_error():
    model = tiny_model().train()
    SmallMemory(model, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        list(sampler(model)(draws()))
    assert model.training


def test_other_errors_are_not_taken_for_memory():
    model = tiny_model()
    model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(sampler(model)(draws()))


def test_a_model_that_accelerate_offloads():
    expected = texts(sampler()(draws()))
    model = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    assert texts(sampler(model)(draws())) == expected


def test_rows_of_a_steered_model_have_their_own_strength():
    model = get_peft_model(tiny_model(), PSRConfig(init_weights=False)).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "direction" in name:
                weights.normal_(generator=torch.Generator().manual_seed(3)).mul_(3)
    prompts = [[{"role": "user", "content": text}] for text in QUESTIONS for _ in range(4)]
    settings = {"max_new_tokens": 8, "seed": 2, "batch_size": 16}
    plain = sample_completions(tiny_model(), tokenizer(), prompts, **settings)
    steered = sample_completions(model, tokenizer(), prompts, **settings)
    assert plain != steered
    mixed = sample_completions(model, tokenizer(), prompts, alpha=[0.0, 1.0] * (len(prompts) // 2), **settings)
    assert mixed == [(plain, steered)[i % 2][i] for i in range(len(prompts))]


def test_describe():
    described = sampler().describe()
    assert described["template_hash"] == template_hash(tokenizer().chat_template)
    assert described["engine"] == "transformers" and described["dtype"] == "float32"
    assert sampler(name="embedded").describe()["model"] == "embedded"
    assert template_hash(None) is None and template_hash({"default": "a"}) != template_hash({"default": "b"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"temperature": -0.5}, "temperature must not be negative, got -0.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(**settings)


def test_a_completion_of_plain_text_keeps_the_blank_it_begins_with():
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"\u2581w{i}" for i in range(60))])
    }
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = Metaspace(), MetaspaceDecoder()
    spaced = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert spaced.decode(spaced("w1 w2").input_ids[1:]) == "w2"  # what the decoder drops
    drawn = sample_completions(tiny_model(), spaced, ["w1 w2 w3"], max_new_tokens=4, seed=5)
    text = drawn[0].text
    assert text.startswith(" w") and spaced("w1 w2 w3" + text).input_ids[:3] == spaced("w1 w2 w3").input_ids
