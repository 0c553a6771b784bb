"""LoRA's strength against weights merged by hand, what is measured at it, and its training against a plain loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import lora, steered_model
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_psr import tiny_chat_path
from peft_psr.base_model.decoder import capture_layer_outputs
from peft_psr.evaluation import (
    intervention_strength,
    neutral_kl,
    prompt_recovery,
    relative_rmse,
    score_model,
    text_perplexity,
)
from peft_psr.evaluation.measures.strength import at_strength, run_adapter_branch, sample_steered
from peft_psr.evaluation.methods.fitting.likelihood import train_by_likelihood
from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.tiny_chat import prompt_messages, questions
from peft_psr.training import TripletCollator, sample_completions
from peft_psr.training.judges.grammar import GrammarJudge


LORA_1, LORA_8 = METHODS["LoRA r=1"], METHODS["LoRA r=8"]
IDS = torch.tensor([[1, 5, 9, 10, 11, 2, 6, 12]])


def lora_model(base=None, scale=0.1, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    return lora(base or tiny_model(), seed=3, std=scale, **settings)


def merged(model, alpha, scaling):
    """The base model with alpha * scaling * B A added to its weights, by name."""
    base, state = tiny_model(), model.state_dict()
    with torch.no_grad():
        for key, lora_a in state.items():
            if ".lora_A." in key:
                name = key.removeprefix("base_model.model.").partition(".lora_A")[0]
                base.get_submodule(name).weight += alpha * scaling * state[key.replace("lora_A", "lora_B")] @ lora_a
    return base


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


# ---------------------------------------------------------------- strength


@pytest.mark.parametrize(("settings", "scaling"), [({}, 6 / 4), ({"use_rslora": True}, 6 / math.sqrt(4))])
def test_a_loras_strength_scales_its_weights(settings, scaling):
    model = lora_model(**settings)
    as_trained, base = logits(model), logits(tiny_model())
    assert not torch.allclose(as_trained, base, atol=0.1)
    with at_strength(model, 0):
        assert torch.equal(logits(model), base)
    with at_strength(model, 1):
        assert torch.equal(logits(model), as_trained)
    for alpha in (2, 0.5, -1):
        with at_strength(model, alpha):
            torch.testing.assert_close(logits(model), logits(merged(model, alpha, scaling)), atol=1e-3, rtol=1e-3)
    with at_strength(model, 3), at_strength(model, 1):
        assert torch.equal(logits(model), as_trained)
    with pytest.raises(RuntimeError), at_strength(model, 3):
        raise RuntimeError
    assert torch.equal(logits(model), as_trained)


def test_a_psr_adapters_strength_is_its_alpha():
    model = steered_model(alpha=1.7, positions="all")
    as_saved = logits(model)
    for alpha in (0.0, 1.0, -2.5):
        expected = model(IDS, alpha=alpha).logits
        with at_strength(model, 3.0), at_strength(model, alpha):
            assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), as_saved) and model.peft_config["default"].alpha == 1.7


def test_what_has_no_strength():
    for model in (
        tiny_model(),
        get_peft_model(tiny_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    ):
        with pytest.raises(TypeError, match="Only a PEFT model with a PSR or a LoRA adapter"), at_strength(model, 1.0):
            pass
        with pytest.raises(TypeError, match="Only a PEFT model"):
            relative_rmse(model, triplets(), tiny_tokenizer())
    with pytest.raises(TypeError, match="alpha must be a number, got '2'"), at_strength(lora_model(), "2"):
        pass
    with pytest.raises(ValueError, match="alpha must be finite"), at_strength(lora_model(), math.nan):
        pass
    for settings, part in (
        ({"use_dora": True}, "variant='DoraLinearVariant'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ):
        with (
            pytest.raises(ValueError, match=f"has {part}.* does not scale with alpha"),
            at_strength(lora_model(**settings), 1.0),
        ):
            pass
    model = lora_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"), at_strength(model, 1.0):
        pass


# ---------------------------------------------------------------- what is measured at a strength


def naive_branches(model, triplet, alpha):
    """{branch: (log-probabilities (response, vocabulary), hidden (response + 1, d) of each layer)}; response ids."""
    row = TripletCollator(tiny_tokenizer(), alpha=1.0).encode(triplet)
    ids, prompted = torch.tensor([row["input_ids"]]), torch.tensor([row["teacher_input_ids"]])
    n = ids.shape[1] - row["prompt_length"]
    runs = {"base": (tiny_model(), ids), "steered": (merged(model, alpha, 6 / 4), ids)}
    found = {}
    for name, (runner, tokens) in {**runs, "prompted": (tiny_model(), prompted)}.items():
        with capture_layer_outputs(runner, [f"model.layers.{i}" for i in range(4)]) as outputs:
            log_probs = logits(runner, tokens)[0, -n - 1 : -1].log_softmax(-1)
        found[name] = log_probs, [hidden[0, -n - 1 :] for hidden in outputs.values()]
    return found, ids[0, -n:]


def test_measures_of_a_lora_worked_out_row_by_row():
    model, tokenizer, alpha = lora_model(), tiny_tokenizer(), 0.5
    recovery, kl, entropy = {"base": 0.0, "steered": 0.0}, {"steered": 0.0, "prompted": 0.0}, {}
    error, effect, tokens = [0.0] * 4, [0.0] * 4, 0
    for triplet in triplets():
        found, ids = naive_branches(model, triplet, alpha)
        tokens += len(ids)
        log_probs = {name: values for name, (values, _) in found.items()}
        for name in recovery:
            recovery[name] += F.kl_div(log_probs[name], log_probs["prompted"], log_target=True, reduction="sum").item()
        for name in kl:
            kl[name] += F.kl_div(log_probs[name], log_probs["base"], log_target=True, reduction="sum").item()
        for name, values in log_probs.items():
            entropy[name] = entropy.get(name, 0.0) - values[torch.arange(len(ids)), ids].sum().item()
        for i in range(4):
            prompted = found["prompted"][1][i]
            error[i] += (prompted - found["steered"][1][i]).square().sum().item()
            effect[i] += (prompted - found["base"][1][i]).square().sum().item()
    settings = {"alpha": alpha, "batch_size": 3}
    expected = 1 - recovery["steered"] / recovery["base"]
    assert prompt_recovery(model, triplets(), tokenizer, **settings) == pytest.approx(expected, abs=1e-3)
    rmse = relative_rmse(model, triplets(), tokenizer, **settings)
    assert rmse == pytest.approx({i: math.sqrt(error[i] / effect[i]) for i in range(4)}, rel=1e-3)
    measured = neutral_kl(model, triplets(), tokenizer, **settings)
    assert measured.tokens == tokens and measured.steered == pytest.approx(kl["steered"] / tokens, rel=1e-3)
    assert measured.prompted == pytest.approx(kl["prompted"] / tokens, rel=1e-3)
    perplexity = text_perplexity(model, triplets(), tokenizer, **settings)
    for name, total in entropy.items():
        assert getattr(perplexity, name) == pytest.approx(math.exp(total / tokens), rel=1e-3)
    assert len({perplexity.base, perplexity.steered, perplexity.prompted}) == 3 and abs(expected) > 0.01
    words, by_prompt, by_adapter = intervention_strength(model, triplets()[0], tokenizer)
    assert words == ["<assistant>", "tea", "is", "good", "</t>"] and by_prompt.shape == by_adapter.shape == (4, 5)


def test_a_lora_at_strength_0_does_nothing():
    model, tokenizer = lora_model(), tiny_tokenizer()
    assert prompt_recovery(model, triplets(), tokenizer, alpha=0.0) == 0.0
    assert relative_rmse(model, triplets(), tokenizer, alpha=0.0) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    assert neutral_kl(model, triplets(), tokenizer, alpha=0.0).steered == 0.0
    perplexity = text_perplexity(model, triplets(), tokenizer, alpha=0.0)
    assert perplexity.steered == perplexity.base


def test_a_lora_has_one_strength_a_batch():
    batch = TripletCollator(tiny_tokenizer())([*triplets(trait_score=50.0), *triplets(trait_score=100.0)])
    with pytest.raises(ValueError, match=r"one strength for the whole batch, got \[0.5, 1.0\]"):
        run_adapter_branch(lora_model(), batch, [], "student")


def test_dropout_is_off_while_measuring():
    model = lora_model(lora_dropout=0.5)
    expected = prompt_recovery(model, triplets(), tiny_tokenizer())
    assert prompt_recovery(model.train(), triplets(), tiny_tokenizer()) == expected and model.training


def test_scores_of_a_loras_strengths_in_one_call_equal_scores_of_each():
    model = lora_model(AutoModelForCausalLM.from_pretrained(tiny_chat_path()), scale=0.1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_path())
    prompts = [prompt_messages(question.text) for question in questions("test")[:3]]
    judge, settings = GrammarJudge("pirate"), {"max_new_tokens": 40, "num_draws": 2}
    together = score_model(model, tokenizer, prompts, judge, alphas=[0.0, 1.0], **settings)
    assert together == [
        score_model(model, tokenizer, prompts, judge, alphas=[alpha], **settings)[0] for alpha in (0.0, 1.0)
    ]
    (as_it_is,) = score_model(model, tokenizer, prompts, judge, **settings)
    assert (as_it_is.trait, as_it_is.coherence) == (together[1].trait, together[1].coherence)
    with model.disable_adapter():
        (plain,) = score_model(model, tokenizer, prompts, judge, **settings)
    assert (plain.trait, plain.coherence) == (together[0].trait, together[0].coherence)
    assert together[0].coherence > together[1].coherence


def test_completions_keep_the_order_of_their_prompts():
    prompts = [[{"role": "user", "content": text}] for text in ("what is tea", "dogs", "a b c d e", "yes")]
    settings = {"max_new_tokens": 6, "seed": 5}
    alpha = [2.0, 0.0, 2.0, 0.0]
    for make in (lora_model, steered_model):
        model = make()
        drawn = sample_steered(model, tiny_tokenizer(), prompts, alpha, temperature=0, **settings)
        for prompt, strength, completion in zip(prompts, alpha, drawn, strict=True):
            with at_strength(model, strength):
                alone = sample_completions(model, tiny_tokenizer(), [prompt], temperature=0, **settings)
            assert [completion] == alone
        assert len({completion.text for completion in drawn}) > 2
    # a PSR adapter's are what `sample_completions` gives
    expected = sample_completions(model, tiny_tokenizer(), prompts, alpha=alpha, **settings)
    assert sample_steered(model, tiny_tokenizer(), prompts, alpha, **settings) == expected


# ---------------------------------------------------------------- training


def fit(method=LORA_1, base=None, rows=None, **settings):
    settings = {"layer": 1, "epochs": (1.0, 3.0), "batch_size": 2} | settings
    base = base or tiny_model()
    torch.seed()  # whatever the global random state was before, the fit's own seed counts
    return method.fit(base, tiny_tokenizer(), rows or triplets(), FitSettings(**settings))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_is_a_plain_loop_over_the_likelihood():
    """All triplets a step, so that their order does not matter: AdamW, rate linear to zero, mean over tokens."""
    steps, rate = 4, 1e-2
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    naive = copy.deepcopy(adapted)
    settings = FitSettings(layer=0, epochs=(1.0, steps), batch_size=8)
    train_by_likelihood(adapted, tiny_tokenizer(), triplets(), settings, rate)

    rows = [TripletCollator(tiny_tokenizer(), alpha=1.0).encode(triplet) for triplet in triplets()]
    parameters = [parameter for parameter in naive.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        losses = []
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            log_probs = naive(ids[None]).logits[0].log_softmax(-1)
            losses += [-log_probs[i - 1, ids[i]] for i in range(row["prompt_length"], len(ids))]
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    expected, found = weights(naive), weights(adapted)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)
    assert max(value.abs().max() for name, value in found.items() if "lora_B" in name) > rate


def test_a_fit_follows_from_its_seed_and_never_reads_the_steered_prompt():
    first = fit(seed=1)
    assert first.model.active_adapters == ["default"] and not first.model.training
    assert first.notes == {"learning_rate": 1e-3, "alpha_while_training": 1.0}
    expected = weights(first.model)
    assert same(weights(fit(seed=1).model), expected) and not same(weights(fit(seed=2).model), expected)
    assert same(weights(fit(seed=1, rows=triplets("now be brief")).model), expected)
    assert not same(weights(fit(seed=1, learning_rate=3e-3).model), expected)


@pytest.mark.parametrize(("method", "r"), [(LORA_1, 1), (LORA_8, 8)])
def test_a_fit_edits_attention_and_mlp_and_leaves_the_base_model_as_it_was(method, r):
    base, told = tiny_model(), []
    fitted = fit(method, base, on_step=lambda done, steps: told.append((done, steps)))
    assert told == [(step, 6) for step in range(1, 7)]
    found = weights(fitted.model)
    targets = {name.split(".lora_")[0].split(".")[-1] for name in found}
    assert targets == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {value.shape[0] for name, value in found.items() if "lora_A" in name} == {r}
    assert not torch.equal(logits(fitted.model), logits(tiny_model()))
    assert fitted.model.unload() is base
    plain = tiny_model().state_dict()
    assert base.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in base.state_dict().items())


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match=r"try a learning rate below 1e\+30"):
        fit(learning_rate=1e30)
    with pytest.raises(ValueError, match="triplets is empty"):
        LORA_1.fit(tiny_model(), tiny_tokenizer(), [], FitSettings(layer=0))
