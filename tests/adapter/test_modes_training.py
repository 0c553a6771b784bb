"""The ways a model is trained and copied, each with its plainest invariant.

Each test's docstring is its line in the table of modes in `docs/layouts.md` (`scripts/tabulate_layouts.py`).
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers.adapters import randomize, steered
from helpers.models import ATTENTION, IDS, LAYERS, generate, logits, tiny_model
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, TorchAoConfig

from peft_psr import PSRConfig


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("which", ["PeftModel", "base model"])
def test_copies_are_independent(copied, which):
    """deepcopy, pickle and `torch.save` of the whole model: equal, and what is done to one leaves the other alone."""
    steered_model = steered(tiny_model())
    source = steered_model if which == "PeftModel" else steered_model.get_base_model()
    expected, tokens = logits(source), generate(source)
    other = copied(source)
    assert torch.equal(logits(other), expected) and torch.equal(generate(other), tokens)

    layers = [module for module in other.modules() if type(module).__name__ == "PSRLayer"]
    originals = {id(module) for module in source.modules()}
    assert len(layers) == LAYERS and not any(id(module) in originals for module in other.modules())
    for layer in layers:
        layer.config["default"].alpha = 0.0
    assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(source), expected) and torch.equal(generate(source), tokens)

    steered_model.set_alpha(3.0)
    randomize(steered_model, seed=9)
    unsteered = logits(tiny_model())
    assert torch.equal(logits(other), unsteered)
    assert torch.equal(generate(other), generate(tiny_model()))
    assert not torch.equal(generate(source), tokens)
    # the copy's generate goes to the copy, with its own mask and strength
    for layer in layers:
        layer.config["default"].alpha = 1.0
    assert torch.equal(generate(other, alpha=1.0), tokens)


def test_state_dict_round_trip():
    """`state_dict` and `load_state_dict` of the whole model carry the adapter."""
    model = steered(tiny_model())
    other = get_peft_model(tiny_model(seed=4), PSRConfig()).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("targets", [None, ["down_proj"]])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, targets):
    """Gradient checkpointing, reentrant and not, edits recomputed or not: loss and gradients are those without."""

    def loss_and_gradients(checkpointing):
        model = steered(tiny_model(), r=4, target_modules=targets)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        mask = torch.tensor([[0, 0, 0, 1, 1, 1]] * len(IDS))
        labels = IDS.masked_fill(mask == 0, -100)
        loss = model(input_ids=IDS, attention_mask=ATTENTION, labels=labels, alpha=[0.5, 1.0, 1.5]).loss
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    loss, expected = loss_and_gradients(False)
    checkpointed, got = loss_and_gradients(True)
    assert torch.equal(loss, checkpointed) and list(got) == list(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_inference_mode():
    """`torch.inference_mode`: equal logits and tokens, and training afterwards still works."""
    model = steered(tiny_model())
    expected, tokens = logits(model), generate(model)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS, attention_mask=ATTENTION).logits, expected)
        assert torch.equal(generate(model), tokens)
        model.set_alpha(0.5)
        model.set_alpha(1.0)
    model(input_ids=IDS, attention_mask=ATTENTION, labels=IDS).loss.backward()
    assert model.psr_layers()[0].psr_unit["default"].direction.grad.abs().max() > 0


def test_modules_to_save(tmp_path):
    """`modules_to_save=["lm_head"]`: trained beside the adapter, saved and reloaded; the base's own head stays."""
    model = steered(tiny_model(), layers_to_transform=1, modules_to_save=["lm_head"]).train()
    original = tiny_model().lm_head.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, attention_mask=ATTENTION, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    head = model.get_base_model().lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, original)
    assert torch.equal(head.original_module.weight, original)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(logits(reloaded), trained)
    with reloaded.disable_adapter():
        assert torch.equal(logits(reloaded), logits(tiny_model()))
    base = reloaded.unload()  # which, as everywhere in PEFT, keeps the trained module
    assert type(base.lm_head) is torch.nn.Linear and torch.equal(
        base.lm_head.weight, head.modules_to_save["default"].weight
    )


def test_requires_grad(tmp_path):
    """Only the active adapter asks for gradients: `set_adapter`, `inference_mode`, `is_trainable`, a frozen base."""

    def trainable(model):
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(".psr.psr_unit." in name for name in names)
        return {name.split("psr_unit.")[1].split(".")[0] for name in names}

    model = steered(tiny_model(), adapter_name="a", layers_to_transform=[0, 1])
    assert trainable(model) == {"a"}
    model.add_adapter("b", PSRConfig(layers_to_transform=[1, 2]))
    assert trainable(model) == {"a"}
    model.set_adapter("b")
    assert trainable(model) == {"b"}
    model.set_adapter("a", inference_mode=True)
    assert trainable(model) == set() and model.active_adapters == ["a"]
    model.base_model.set_adapter(["a", "b"])
    assert trainable(model) == {"a", "b"}
    model.set_requires_grad("a", requires_grad=False)
    assert trainable(model) == {"b"}
    model.save_pretrained(tmp_path)
    assert trainable(PeftModel.from_pretrained(tiny_model(), tmp_path / "a")) == set()
    assert trainable(PeftModel.from_pretrained(tiny_model(), tmp_path / "a", is_trainable=True)) == {"default"}
    assert trainable(get_peft_model(tiny_model(), PSRConfig(inference_mode=True))) == set()


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_base(kind, tmp_path):
    """torchao int8 bases: a training step, saving, reloading, cached generation; `unload` restores bit for bit."""
    quantization = pytest.importorskip("torchao.quantization")
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")

    def quantized():
        config = TorchAoConfig(getattr(quantization, kind)())
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False).eval()

    base = quantized()
    assert "Int8" in type(base.model.layers[0].self_attn.q_proj.weight).__name__
    plain = logits(base)
    model = get_peft_model(base, PSRConfig(positions="all"))
    assert torch.equal(logits(model), plain)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(model(input_ids=IDS, attention_mask=ATTENTION, labels=IDS.masked_fill(IDS == 0, -100)).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    model.eval()
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(quantized(), tmp_path / "adapter").eval()
    assert torch.equal(logits(reloaded), trained)
    assert torch.equal(generate(reloaded), generate(model, use_cache=False))
    assert torch.equal(logits(model.unload()), plain)
