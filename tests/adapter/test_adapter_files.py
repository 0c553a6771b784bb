"""Adapters saved, loaded, copied, and several on one model."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.adapters import randomize, steered, weights_of
from helpers.models import PROMPTS, WIDTH, tiny_model
from helpers.reference import naive_logits
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_psr import PSRConfig


@pytest.mark.long
def test_save_and_reload(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    settings = {"layers_to_transform": [1, 3], "r": 2, "alpha": 1.7, "coefficient_bias": 0.1, "positions": "all"}
    model = steered(copy.deepcopy(base), adapter_name="formal", **settings)
    ids = torch.tensor([PROMPTS[0]])
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "adapter" / "formal"

    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PSR" and {**saved, **settings} == saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert {name.rsplit(".", 1)[1]: tuple(t.shape) for name, t in tensors.items()} == {
        "gate_weight": (2, WIDTH),
        "gate_bias": (2,),
        "direction": (2, WIDTH),
    }
    assert len(tensors) == 6

    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="again").eval()
    assert torch.equal(reloaded(ids).logits, logits)
    auto = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(auto(ids).logits, logits)

    torch.save(logits, tmp_path / "logits.pt")
    script = (
        "import sys, torch, peft_psr; from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).eval()\n"
        f"logits = torch.load({str(tmp_path / 'logits.pt')!r})\n"
        f"sys.exit(not torch.equal(model(torch.tensor({ids.tolist()})).logits, logits))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path).returncode == 0


def test_constant_gate_saves_direction_alone(tmp_path):
    model = steered(tiny_model(), gate="constant", layers_to_transform=2)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert [name.rsplit(".", 1)[1] for name in names] == ["direction"]


def test_many_adapters_set_delete_and_sum():
    base = tiny_model()
    model = steered(copy.deepcopy(base), adapter_name="a", layers_to_transform=1)
    model.add_adapter("b", PSRConfig(layers_to_transform=2, gate="constant"))
    randomize(model, "psr_unit.b.", seed=2)
    ids = torch.tensor([PROMPTS[0]])
    row, m = PROMPTS[0], [0] * (len(PROMPTS[0]) - 1) + [1]
    layers = model.psr_layers()
    weights = {name: weights_of(model, name) for name in ("a", "b")}

    def check(expected):
        want = naive_logits(base, row, expected, m, 1.0)
        torch.testing.assert_close(model(ids).logits[0], want, atol=2e-4, rtol=1e-4)

    check(weights["a"])
    model.set_adapter("b")
    check(weights["b"])
    model.base_model.set_adapter(["a", "b"])
    both = {**weights["a"], **weights["b"]}
    check(both)
    model.set_adapter("a")
    model.delete_adapter("b")
    assert "b" not in model.peft_config and all("b" not in layer.psr_unit for layer in layers.values())
    check(weights["a"])


def test_copies_and_pickles_are_independent():
    model = steered(tiny_model())
    ids = torch.tensor([PROMPTS[0]])
    logits = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, logits)
        copied.set_alpha(0.0)
        assert not torch.equal(copied(ids).logits, logits)
        copied.unload()
    assert torch.equal(model(ids).logits, logits)


def test_adapter_of_another_method_with_the_same_name_stays_out_of_the_file(tmp_path):
    base = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).base_model.model
    model = steered(base)
    model.save_pretrained(tmp_path)
    assert all(".psr." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
