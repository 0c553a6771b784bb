"""Baselines that are computed without training, against plain hooks on the model."""

from __future__ import annotations

import functools
import json
from contextlib import ExitStack, contextmanager

import pytest
import torch
from helpers.adapters import randomize
from helpers.models import LAYERS, LAYOUTS, WIDTH, tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import PeftModel
from torch import nn

from peft_psr.evaluation.measures.faithfulness import prompt_recovery, relative_rmse
from peft_psr.evaluation.methods import iti, registry
from peft_psr.evaluation.methods.fitting.attention_heads import output_projections
from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.prompts.conversations import encode_prompt
from peft_psr.training import TripletCollator, add_instruction, sample_completions


LAYER = 2
NAMES = {"actadd": "S-Const ActAdd", "stolfo": "Stolfo et al.", "iti": "ITI"}
METHODS = {short: registry.METHODS[name] for short, name in NAMES.items()}
QUESTIONS = ["what is tea", "dogs are good now", "a b c"]
ANSWERS = ["tea is good", "yes", "a b c d e", "no dogs now"]


def triplet(question, instruction, answer):
    prompt = [{"role": "user", "content": question}]
    return {
        "prompt": prompt,
        "steered_prompt": add_instruction(prompt, instruction),
        "completion": answer,
        "trait_score": 80.0,
    }


DATA = [triplet(q, i, a) for i in ("be brief now", "tea is good") for q in QUESTIONS for a in ANSWERS[:2]]
NEUTRAL = triplet("what is good", "", "a b")
TOKENIZER = tiny_tokenizer()


def a_model(layout="llama"):
    """A tiny model whose biases are not 0."""
    return randomize(tiny_model(layout), "bias", std=0.02)


def fitted(method, model, data=DATA, **settings):
    return METHODS[method].fit(model, TOKENIZER, data, FitSettings(layer=LAYER, **settings))


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def projections_of(model):
    return [layer.attn.c_proj if hasattr(layer, "attn") else layer.self_attn.o_proj for layer in layers_of(model)]


@contextmanager
def hooked(module, edit, on_input=False):
    """`edit` applied to a module's input or output."""

    def after(_, arguments, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    def before(_, arguments):
        return (edit(arguments[0]), *arguments[1:])

    handle = module.register_forward_pre_hook(before) if on_input else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def seen(model, module, ids, on_input=False):
    """What a module takes or returns for one row without padding: (seq, width) float64."""
    kept = []

    def keep(values):
        kept.append(values[0].double())
        return values

    with hooked(module, keep, on_input):
        model(input_ids=torch.tensor([ids]))
    return kept[0]


def unique_pairs():
    return [triplet(q, i, "yes") for i in ("be brief now", "tea is good") for q in QUESTIONS]


def at_last_prompt_token(model, prompt):
    return seen(model, layers_of(model)[LAYER], encode_prompt(TOKENIZER, prompt))[-1]


def naive_projection(model):
    """u and c, one prompt after another."""
    plain = torch.stack([at_last_prompt_token(model, pair["prompt"]) for pair in unique_pairs()])
    prompted = torch.stack([at_last_prompt_token(model, pair["steered_prompt"]) for pair in unique_pairs()])
    u = (prompted - plain).mean(dim=0)
    u = u / u.norm()
    return u, (prompted @ u).mean()


@functools.cache
def naive_heads(layout, positions, heads=4):
    """[(accuracy, layer, head, sigma * theta)] of all heads, the best first, from all activations at once."""
    model = a_model(layout)
    collator = TripletCollator(TOKENIZER, positions, alpha=1.0)
    rows = [collator.encode(one) for one in DATA]
    order = sorted(range(len(rows)), key=lambda i: rows[i]["teacher_input_ids"])
    last_fifth = {i for place, i in enumerate(order) if place * 5 // len(rows) == 4}
    found = []
    for number, module in enumerate(projections_of(model)):
        values, labels, held_out = [], [], []
        for i, row in enumerate(rows):
            for label, name in enumerate(("input_ids", "teacher_input_ids")):
                tokens = seen(model, module, row[name], on_input=True)[-row["mask_length"] :]
                values.append(tokens.unflatten(1, (heads, -1)))
                labels += [bool(label)] * len(tokens)
                held_out += [i in last_fifth] * len(tokens)
        x, y, out = torch.cat(values), torch.tensor(labels), torch.tensor(held_out)
        for head in range(heads):
            here = x[:, head]
            a, b = here[y & ~out].mean(dim=0), here[~y & ~out].mean(dim=0)
            said = (here[out] @ (a - b)) > (a + b) / 2 @ (a - b)
            theta = here[y].mean(dim=0) - here[~y].mean(dim=0)
            theta = theta / theta.norm()
            sigma = (here @ theta).std(correction=0)
            found.append(((said == y[out]).double().mean().item(), number, head, sigma * theta))
    return sorted(found, key=lambda one: -one[0])


class Naive:
    """The three edits as hooks on a model of its own, on the tokens of a mask (batch, seq)."""

    def __init__(self, method, layout, result, positions):
        self.model = model = a_model(layout)
        self.edits = []  # (module, function of activations, strength and mask, whether it is the input)
        if method == "actadd":
            pair = (result.notes["steered_prompt"], result.notes["prompt"])
            z = torch.sub(*(at_last_prompt_token(model, prompt) for prompt in pair)).float()
            self.edits.append((layers_of(model)[LAYER], lambda h, alpha, mask: h + alpha * mask * z, False))
        elif method == "stolfo":
            u, c = (value.float() for value in naive_projection(model))
            self.edits.append(
                (layers_of(model)[LAYER], lambda h, alpha, mask: h + alpha * mask * (c - h @ u)[..., None] * u, False)
            )
        else:
            for _, layer, head, shift in naive_heads(layout, positions)[:7]:

                def shifted(x, alpha, mask, head=head, shift=shift):
                    x = x.clone().unflatten(-1, (4, -1))
                    x[..., head, :] += alpha * mask * shift.float()
                    return x.flatten(-2)

                self.edits.append((projections_of(model)[layer], shifted, True))

    @torch.no_grad()
    def logits(self, inputs, alpha, mask):
        with ExitStack() as stack:
            for module, edit, on_input in self.edits:
                edited = functools.partial(edit, alpha=alpha, mask=mask.bool()[..., None])
                stack.enter_context(hooked(module, edited, on_input))
            return self.model(**inputs).logits


@pytest.fixture(autouse=True)
def more_heads(monkeypatch):
    """Seven of sixteen."""
    monkeypatch.setattr(iti, "SHARE_OF_HEADS", 7 / 16)


# ---------------------------------------------------------------- what they do


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_edits_are_those_of_plain_hooks(method, layout, positions):
    result = fitted(method, a_model(layout), positions=positions, batch_size=5)
    assert result.model.active_peft_config.positions == positions
    plain = Naive(method, layout, result, positions)
    batch = TripletCollator(TOKENIZER, positions, alpha=1.0)(DATA[3:6])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for alpha in (-0.5, 1.0, 3.0):
        with torch.no_grad():
            steered = result.model(**inputs, steering_mask=batch["steering_mask"], alpha=alpha).logits
        expected = plain.logits(inputs, alpha, batch["steering_mask"])
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(steered[real], expected[real], atol=2e-4, rtol=1e-3)
    untouched = plain.model(**inputs).logits[real]
    assert (untouched - expected[real]).abs().max() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_generation_is_edited_from_the_last_prompt_token_on(method):
    result = fitted(method, a_model())
    plain = Naive(method, "llama", result, "response")
    ids = encode_prompt(TOKENIZER, DATA[0]["prompt"])
    tokens, mask = list(ids), [0] * (len(ids) - 1) + [1]
    for _ in range(6):
        logits = plain.logits({"input_ids": torch.tensor([tokens])}, 15.0, torch.tensor([mask]))
        tokens.append(int(logits[0, -1].argmax()))
        mask.append(1)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = result.model.generate(input_ids=torch.tensor([ids]), alpha=15.0, **settings)
    assert found[0].tolist() == tokens
    with result.model.disable_adapter():
        assert result.model.generate(input_ids=torch.tensor([ids]), **settings)[0].tolist() != tokens


@pytest.mark.parametrize("method", METHODS)
def test_measured_sampled_saved_and_unloaded_like_any_adapter(method, tmp_path):
    model = a_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = []
    result = fitted(method, model, on_step=lambda done, total: steps.append((done, total)))
    assert not result.model.training and not result.dead_gates
    assert json.loads(json.dumps(result.notes)) == result.notes
    if method != "actadd":
        assert steps[-1][0] == steps[-1][1] == len(steps)
    assert prompt_recovery(result.model, DATA, TOKENIZER, alpha=0.0) == pytest.approx(0.0, abs=1e-5)
    assert prompt_recovery(result.model, DATA, TOKENIZER, alpha=0.5) != pytest.approx(0.0, abs=1e-3)
    errors = relative_rmse(result.model, DATA, TOKENIZER, alpha=0.5)
    assert list(errors) == list(range(LAYERS)) and any(abs(error - 1) > 1e-3 for error in errors.values())
    prompts = [DATA[0]["prompt"]] * 2
    sampled = sample_completions(
        result.model, TOKENIZER, prompts, max_new_tokens=12, alpha=[0.0, 30.0], seed=1, temperature=1.0
    )
    with result.model.disable_adapter():
        bare = sample_completions(result.model, TOKENIZER, prompts, max_new_tokens=12, seed=1, temperature=1.0)
    assert sampled[0] == bare[0] and sampled[1] != bare[1]

    ids = torch.tensor([encode_prompt(TOKENIZER, DATA[0]["prompt"])])
    expected = result.model(input_ids=ids).logits
    result.model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(a_model(), tmp_path).eval()
    assert torch.equal(reloaded(input_ids=ids).logits, expected)
    base = result.model.unload()
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in before.items())


# ---------------------------------------------------------------- activation addition


def test_actadd_is_one_pair_by_the_seed():
    found = {}
    for seed in range(8):
        result = fitted("actadd", a_model(), seed=seed)
        (layer,) = result.model.base_model.psr_layers().values()
        found[json.dumps(result.notes)] = layer.unit("default").direction.detach()
        assert layer.name == f"model.layers.{LAYER}"
        assert result.notes["pairs_to_draw_from"] == 6
    assert 3 <= len(found) <= 6
    again = fitted("actadd", a_model(), data=DATA[::-1] + DATA[:1], seed=7)
    assert again.notes["pairs_to_draw_from"] == 6


# ---------------------------------------------------------------- Stolfo et al.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_projection_is_the_mean_under_the_instruction(layout):
    u, c = naive_projection(a_model(layout))
    result = fitted("stolfo", a_model(layout), data=[NEUTRAL, *DATA])
    assert result.notes["pairs"] == 6
    assert result.notes["projection_prompted"] == pytest.approx(c.item(), rel=1e-4)
    base = result.model.get_base_model()
    batch = TripletCollator(TOKENIZER, "response", alpha=1.0)(DATA[:4])
    mask = batch["steering_mask"].bool()
    after = {}
    for alpha in (0.0, 0.5, 1.0):
        with hooked(layers_of(base)[LAYER], lambda h, alpha=alpha: after.setdefault(alpha, h)), torch.no_grad():
            result.model(batch["input_ids"], batch["attention_mask"], steering_mask=mask, alpha=alpha)
    projected = {alpha: h.double() @ u for alpha, h in after.items()}
    scale = projected[0.0].abs().max()
    assert (projected[1.0][mask] - c).abs().max() < 1e-4 * scale
    assert (projected[0.5][mask] - (projected[0.0][mask] + c) / 2).abs().max() < 1e-4 * scale
    assert (projected[0.0][mask] - c).abs().max() > 0.1
    assert torch.equal(after[1.0][~mask], after[0.0][~mask])
    across = torch.eye(WIDTH, dtype=torch.float64) - torch.outer(u, u)  # nothing else is edited
    assert ((after[1.0] - after[0.0]).double() @ across).abs().max() < 1e-4 * scale


# ---------------------------------------------------------------- ITI


@pytest.mark.parametrize("layout", LAYOUTS)
def test_iti_takes_the_heads_with_the_best_probes(layout):
    expected = naive_heads(layout, "response")[:7]
    result = fitted("iti", a_model(layout), data=[*DATA[:3], NEUTRAL, *DATA[3:]], batch_size=7)
    names = output_projections(a_model(layout))
    found = [(one["accuracy"], names.index(one["module"]), one["head"]) for one in result.notes["heads"]]
    assert result.notes["heads_in_all"] == 16 and len(found) == 7
    for (accuracy, layer, head), one, plain in zip(found, result.notes["heads"], expected, strict=True):
        assert (layer, head) == plain[1:3]
        assert accuracy == pytest.approx(plain[0], abs=1e-4)
        assert one["sigma"] == pytest.approx(plain[3].norm().item(), rel=1e-3)


def test_iti_takes_the_share_of_the_paper(monkeypatch):
    monkeypatch.undo()
    assert iti.SHARE_OF_HEADS * 1024 == 48
    result = fitted("iti", a_model())
    assert len(result.notes["heads"]) == 1
    assert list(result.model.base_model.psr_layers()) == [result.notes["heads"][0]["module"]]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([NEUTRAL, NEUTRAL], "`steered_prompt`"),
        ([], "triplets"),
        ([{**DATA[0], "completion": ""}], r"triplets\[0\]: completion missing or empty"),
    ],
)
def test_useless_triplets_leave_the_model_as_it_was(method, data, message):
    model = a_model()
    with pytest.raises(ValueError, match=message):
        fitted(method, model, data=data)
    assert not any(name.endswith("psr") for name, _ in model.named_modules())


@pytest.mark.parametrize("method", ["actadd", "stolfo"])
def test_no_such_layer(method):
    with pytest.raises(ValueError, match="layer=9, but the model has 4 decoder layers: 0 to 3"):
        METHODS[method].fit(a_model(), TOKENIZER, DATA, FitSettings(layer=9))


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_finite(method):
    model = a_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite.*float16"):
        fitted(method, model)


def test_iti_needs_heads_it_can_read():
    model = a_model()
    for layer in model.model.layers:
        layer.self_attn.final = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    with pytest.raises(ValueError, match="no decoder layer of LlamaForCausalLM has a module called o_proj.*final"):
        fitted("iti", model)
    model = a_model()
    model.model.layers[1].self_attn.dense = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ValueError, match="2 modules that it might be: self_attn.o_proj, self_attn.dense"):
        fitted("iti", model)
    model = a_model()
    del model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.register_module("out_proj", nn.Linear(WIDTH, WIDTH))
    model.model.layers[1].self_attn.o_proj = lambda values: values
    with pytest.raises(ValueError, match="does not call that module"):
        fitted("iti", model)
    model = a_model()
    model.config.num_attention_heads = 5
    with pytest.raises(ValueError, match="32 features, which 5 attention heads can't share"):
        fitted("iti", model)
    model.config.__dict__["num_attention_heads"] = [4, 4]  # as OpenELM's has it
    with pytest.raises(ValueError, match=r"num_attention_heads=\[4, 4\]"):
        fitted("iti", model)


def test_iti_needs_a_triplet_to_hold_out():
    with pytest.raises(ValueError, match="at least two triplets with an instruction.*1 of 2"):
        fitted("iti", a_model(), data=[DATA[0], NEUTRAL])
