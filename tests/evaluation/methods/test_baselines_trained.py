"""Baselines trained by gradient: objectives and edits against plain computations, and what every one of them owes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.models import WIDTH, tiny_model
from helpers.reference import decoder_layers
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft import PeftModel, get_peft_model

from peft_psr import PSRConfig
from peft_psr.evaluation.methods import loreft, reft_r1, registry
from peft_psr.evaluation.methods.fitting import preference
from peft_psr.evaluation.methods.fitting.edit_training import only_unit
from peft_psr.evaluation.methods.loreft import LoReFT
from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.evaluation.methods.reft_r1 import top_latents
from peft_psr.evaluation.methods.reps import SteeringVector
from peft_psr.training import TripletCollator
from peft_psr.training.data.draws import Completion


STEERING_VECTOR_REPS, LOREFT_LIKELIHOOD, LOREFT_REPS, REFT_R1 = (
    registry.METHODS[name] for name in ("S-Const RePS", "S-LoReFT LL", "S-LoReFT RePS", "S-ReFT-r1")
)
METHODS = [STEERING_VECTOR_REPS, LOREFT_LIKELIHOOD, LOREFT_REPS, REFT_R1]
LAYER = 1


def settings(**changed):
    return FitSettings(**{"layer": LAYER, "epochs": (3.0, 1.0), "batch_size": 3, "alpha": 1.0} | changed)


def naive_log_likelihood(model, row, edit=None, layer=LAYER):
    """Log p(y | x), nats, and |y|, of one row by itself; `edit` of (tokens, d) is added where the row's mask is."""
    ids, first = row["input_ids"], row["prompt_length"]

    def hook(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        begin = len(ids) - row["mask_length"]
        hidden[0, begin:] += edit(hidden[0, begin:])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = decoder_layers(model)[layer].register_forward_hook(hook) if edit else None
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        if handle is not None:
            handle.remove()
    total = sum(logits[i - 1].log_softmax(-1)[ids[i]].item() for i in range(first, len(ids)))
    return total, len(ids) - first


def softplus_of_minus(x):
    return math.log1p(math.exp(-x)) if x > -30 else -x


@pytest.fixture
def captured(monkeypatch):
    """What a method hands to `train_edit`, which then does nothing."""
    calls = {}

    def instead(model, edit, loss, rows, collate, settings, learning_rate):
        calls.update(model=model, edit=edit, loss=loss, rows=rows, collate=collate)
        with torch.no_grad():
            calls["values"] = loss(calls.setdefault("batch", collate(rows)), 0.5)

    for module in (preference, loreft, reft_r1):
        monkeypatch.setattr(module, "train_edit", instead)
    return calls


# ---------------------------------------------------------------- objectives


def test_preference_loss_is_its_formula():
    steered, nulled, advantage = (-1.5, -2.0), (-3.0, -0.5), 4.0
    for sign in (1, -1):
        better = sign * advantage
        positive = max(-better, 1) * steered[0] - steered[1]
        negative = max(better, 1) * nulled[1] - nulled[0]
        expected = softplus_of_minus(positive) + softplus_of_minus(negative)
        pairs = [tuple(torch.tensor([value]) for value in run) for run in (steered, nulled)]
        found = preference.preference_loss(*pairs, torch.tensor([better]))
        assert found.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("method", [STEERING_VECTOR_REPS, LOREFT_REPS], ids=lambda method: method.name)
@pytest.mark.parametrize(("layout", "seed"), [("llama", 0), ("llama", 1), ("gpt2", 2)])
def test_reps_of_a_batch_is_that_of_each_row_by_itself(captured, layout, seed, method):
    chosen = settings(seed=seed, alpha="trait_score", positions="question_and_response")
    method.fit(tiny_model(layout), tiny_tokenizer(), triplets(), chosen)
    edit, batch = captured["edit"].double(), captured["batch"]
    plain = tiny_model(layout)
    assert {round(value * 6 / 0.8) for value in batch["strength"].flatten().tolist()} <= {2, 4, 6, 8, 10}

    for i, (steered_row, plain_row, _) in enumerate(captured["rows"]):
        strength = batch["strength"].flatten()[i].item()
        assert strength == batch["strength"].flatten()[i + len(captured["rows"])].item()  # the same for y' and y

        def steer(h, strength=strength):
            if isinstance(edit, SteeringVector):
                return strength * edit.vector.float().expand_as(h)
            R, W, b = (t.float() for t in (edit.rotation.weight, edit.source.weight, edit.source.bias))
            return strength * torch.stack([R.T @ (W @ row + b - R @ row) for row in h])

        def null(h, steer=steer):
            if isinstance(edit, SteeringVector):
                unit = edit.vector.float() / edit.vector.float().norm()
                return torch.stack([-max(0.0, float(row @ unit)) * unit for row in h])
            return -steer(h)

        def both(function=None, rows=(steered_row, plain_row)):
            return [naive_log_likelihood(plain, row, function) for row in rows]

        (p, _), (q, _) = both()
        (s_p, n_p), (s_q, n_q) = both(steer)
        (z_p, _), (z_q, _) = both(null)
        positive = max(q - p, 1) * s_p / n_p - s_q / n_q
        negative = max(p - q, 1) * z_q / n_q - z_p / n_p
        expected = softplus_of_minus(positive) + softplus_of_minus(negative)
        assert captured["values"][i].item() == pytest.approx(expected, rel=1e-4)


def test_likelihood_of_a_batch_is_that_of_each_row_by_itself(captured):
    LOREFT_LIKELIHOOD.fit(tiny_model(), tiny_tokenizer(), triplets(), settings(alpha=0.7, layer=3))
    edit = captured["edit"]
    R, W, b = edit.rotation.weight, edit.source.weight, edit.source.bias
    for value, row in zip(captured["values"], captured["rows"], strict=True):
        total, count = naive_log_likelihood(tiny_model(), row, lambda h: 0.7 * (h @ W.T + b - h @ R.T) @ R, layer=3)
        assert value.item() == pytest.approx(-total / count, rel=1e-4)


def test_largest_latents_by_hand():
    latents = torch.tensor([[9.0, 1.0, 4.0, 2.0], [9.0, 9.0, 3.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    sizes, others = top_latents(latents, mask, 2)
    assert sizes.tolist() == [3.0, 3.0] and others.tolist() == pytest.approx([1 / 3, 0.0])


def test_reft_r1_of_a_batch_is_that_of_each_row_by_itself(captured, monkeypatch):
    monkeypatch.setattr(reft_r1, "TOP_K", 2)
    monkeypatch.setattr(reft_r1, "PENALTY", 1.0)
    fitted = REFT_R1.fit(tiny_model(), tiny_tokenizer(), triplets(), settings(alpha=0.7))
    w = captured["edit"].vector.detach() / captured["edit"].vector.detach().norm()
    sizes = []
    for value, row in zip(captured["values"], captured["rows"], strict=True):
        latents = []

        def edit(h, latents=latents):
            latents.extend(sorted((max(0.0, float(token @ w)) for token in h), reverse=True))
            return 0.7 * sum(latents[:2]) / min(2, len(latents)) * w.expand_as(h)

        total, count = naive_log_likelihood(tiny_model(), row, edit)
        penalty = 0.5 * sum(latents[2:]) / len(latents)
        assert value.item() == pytest.approx(-total / count + penalty, rel=1e-4)
        sizes.append(sum(latents[:2]) / min(2, len(latents)))
    # afterwards: a constant vector of the mean size of what was added
    assert fitted.notes["addition"] == pytest.approx(sum(sizes) / len(sizes), rel=1e-4)
    assert torch.allclose(only_unit(fitted.model).direction[0], fitted.notes["addition"] * w, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_reft_r1_starts_with_the_sign_of_the_larger_latents(captured, seed):
    found = REFT_R1.fit(tiny_model(), tiny_tokenizer(), triplets(), settings(seed=seed)).notes["addition"]
    w, opposite = captured["edit"].direction.detach(), []
    for row in captured["rows"]:
        latents = []
        naive_log_likelihood(tiny_model(), row, lambda h, latents=latents: latents.extend((h @ -w).relu()) or 0 * h)
        opposite.append(sum(float(latent) for latent in latents) / len(latents))
    assert found >= sum(opposite) / len(opposite)


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_converted_loreft_is_the_trained_module(layout, alpha):
    torch.manual_seed(3)
    model = tiny_model(layout)
    module = LoReFT(WIDTH, 4)
    with torch.no_grad():
        module.source.weight.normal_()
        module.source.bias.normal_()
    ids = torch.randint(5, 30, (2, 9))

    def hook(layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        R, W, b = module.rotation.weight, module.source.weight, module.source.bias
        new = torch.stack([torch.stack([h + alpha * R.T @ (W @ h + b - R @ h) for h in row]) for row in hidden])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = decoder_layers(model)[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        handle.remove()
        assert torch.dist(module.rotation.weight @ module.rotation.weight.T, torch.eye(4)) < 1e-5
        steered = get_peft_model(model, PSRConfig(r=8, layers_to_transform=LAYER, positions="all", alpha=alpha))
        module.write(only_unit(steered))
        found = steered(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_every_method_owes(method, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    fitted = method.fit(
        model, tokenizer, triplets(), settings(seed=1, on_step=lambda done, of: steps.append((done, of)))
    )
    assert steps == [(1, 2), (2, 2)]  # one pass over four triplets, three at a time
    assert not fitted.model.training and fitted.model.active_adapter == "default"
    assert not any(layer._disable_adapters for layer in fitted.model.base_model.psr_layers().values())
    ids = torch.tensor([tokenizer.encode("<s> <user> what is tea </t> <assistant>")])
    with torch.no_grad():
        steered = fitted.model(input_ids=ids).logits
        fitted.model.save_pretrained(str(tmp_path))
        weights = {name: value.clone() for name, value in only_unit(fitted.model).state_dict().items()}
        base = fitted.model.unload()
        assert not torch.allclose(base(input_ids=ids).logits, steered)
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        assert all(parameter.grad is None for parameter in base.parameters())
        reloaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        assert torch.equal(reloaded(input_ids=ids).logits, steered)

    def again(seed):
        return only_unit(method.fit(tiny_model(), tokenizer, triplets(), settings(seed=seed)).model).state_dict()

    same, other = again(1), again(2)
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert not torch.equal(weights["direction"], other["direction"])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_does_what_it_is_for(method):
    """By RePS y' becomes likelier beside the model's own answers; by likelihood, likelier by itself."""
    tokenizer, data = tiny_tokenizer(), triplets()
    fitted = method.fit(tiny_model(), tokenizer, data, settings(epochs=(1.0, 8.0), batch_size=4, learning_rate=1e-1))
    unit, plain = only_unit(fitted.model), tiny_model()
    collator = TripletCollator(tokenizer, "response", 1.0)

    def edit(h):
        with torch.no_grad():
            return unit(h, torch.zeros_like(h), 1.0)[0]

    def mean(rows, function=None):
        values = [naive_log_likelihood(plain, row, function) for row in rows]
        return sum(total / count for total, count in values) / len(values)

    rows = [collator.encode(triplet) for triplet in data]
    gain = mean(rows, edit) - mean(rows)
    if method.objective == "reps":
        own = preference.sample_completions(plain, tokenizer, [t["prompt"] for t in data], 6, seed=0)
        own_rows = [
            collator.encode({**t, "completion": a.text, "truncated": a.truncated})
            for t, a in zip(data, own, strict=True)
        ]
        gain -= mean(own_rows, edit) - mean(own_rows)
    assert gain > 0.1


# ---------------------------------------------------------------- mistakes


def test_answers_that_cannot_be_used_are_left_out_and_counted(monkeypatch):
    def drawn(texts):
        answers = [Completion(text, not text) for text in texts]
        monkeypatch.setattr(preference, "sample_completions", lambda *args, **kwargs: answers)
        return STEERING_VECTOR_REPS.fit(tiny_model(), tiny_tokenizer(), triplets(), settings())

    assert drawn(["tea", "", "yes", "no"]).notes == {"triplets_left_out": 1}
    with pytest.raises(ValueError, match="None of the model's own answers .* missing or empty"):
        drawn([""] * 4)


def test_a_layer_that_is_not_there_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(preference, "sample_completions", None)
    with pytest.raises(ValueError, match="9"):
        STEERING_VECTOR_REPS.fit(tiny_model(), tiny_tokenizer(), triplets(), settings(layer=9))


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(FloatingPointError, match="the loss is"):
        LOREFT_LIKELIHOOD.fit(tiny_model(), tiny_tokenizer(), triplets(), settings(learning_rate=math.inf))
