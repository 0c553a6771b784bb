"""Every way into a steered model: PEFT's, transformers' own, and those that are closed or need `import peft_psr`.

Docstrings are lines of the table of doors in `docs/layouts.md`.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from helpers.adapters import randomize, steered
from helpers.models import IDS, PROMPTS, generate, logits, tiny_model
from helpers.paths import DOCS
from helpers.tokenizers import tiny_tokenizer
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_psr import PSRConfig


methods_of_bare_models = pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"The adapter methods of this transformers want PEFT {MIN_PEFT_VERSION} (docs/versions.md)",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `base` (and its tokenizer), the adapter `adapter` and another, `second`, for layers 1 and 2."""
    folder = tmp_path_factory.mktemp("doors")
    base = tiny_model()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    steered(copy.deepcopy(base), alpha=0.8).save_pretrained(folder / "adapter")
    steered(base, seed=7, layers_to_transform=[1, 2], positions="all").save_pretrained(folder / "second")
    return folder


def expected_model(seed=1, **settings):
    return steered(tiny_model(), seed=seed, **settings)


@pytest.fixture(scope="module")
def expected():
    """What the adapter does, as `PeftModel` shows it."""
    return expected_model(alpha=0.8)


def second_model():
    return expected_model(seed=7, layers_to_transform=[1, 2], positions="all")


def load_adapter(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    base.load_adapter(str(saved / "adapter"))
    return base


def of_pipeline(saved):
    return pipeline("text-generation", model=str(saved / "adapter"), tokenizer=tiny_tokenizer()).model


DOORS = {
    "PeftModel.from_pretrained": lambda saved: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "adapter", adapter_name="formal"
    ),
    "AutoPeftModelForCausalLM": lambda saved: AutoPeftModelForCausalLM.from_pretrained(saved / "adapter"),
    "AutoModelForCausalLM": lambda saved: AutoModelForCausalLM.from_pretrained(saved / "adapter"),
    "load_adapter": load_adapter,
    "pipeline": of_pipeline,
    "get_base_model": lambda saved: DOORS["PeftModel.from_pretrained"](saved).get_base_model(),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_steers_alike(door, saved, expected):
    """Forward and `generate` behind each door: `alpha`, one a row, `steering_mask`, cached or not, as `PeftModel`."""
    model = DOORS[door](saved).eval()
    mask = torch.zeros_like(IDS)
    mask[:, 3:] = 1
    assert not torch.equal(logits(expected), logits(tiny_model()))
    for more in ({}, {"alpha": 1.5}, {"alpha": [0.0, 1.0, -2.0]}, {"steering_mask": mask, "alpha": 2.0}):
        torch.testing.assert_close(logits(model, **more), logits(expected, **more))
        tokens = generate(expected, **more)
        assert torch.equal(generate(model, **more), tokens)
        assert torch.equal(generate(model, use_cache=False, **more), tokens)
    assert torch.equal(generate(model, num_beams=2, alpha=1.5), generate(expected, num_beams=2, alpha=1.5))


@pytest.mark.parametrize("model", ["adapter folder", "PeftModel", "base with load_adapter"])
def test_pipeline(model, saved, expected):
    """`pipeline("text-generation")` from a folder or a model: `PeftModel.generate`'s text, `alpha=` included."""
    source = {
        "adapter folder": lambda: str(saved / "adapter"),
        "PeftModel": lambda: DOORS["AutoPeftModelForCausalLM"](saved),
        "base with load_adapter": lambda: load_adapter(saved),
    }[model]()
    tokenizer = tiny_tokenizer(" ".join(["what", "is", "tea", *(f"word{i}" for i in range(54))]))  # all of the model's
    chat = [{"role": "user", "content": "what is tea"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generator = pipeline("text-generation", model=source, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    texts = []
    for more in ({}, {"alpha": 3.0}):
        tokens = expected.generate(**ids, **settings, pad_token_id=0, **more)
        texts.append(tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        answer = generator([chat], **settings, **more)[0][0]["generated_text"]
        assert answer[-1]["content"].split() == texts[-1].split()
    assert texts[0] != texts[1]


@methods_of_bare_models
def test_a_second_adapter(saved, expected):
    """`PeftModel.load_adapter` and `PreTrainedModel.load_adapter`: a second adapter, one or both of them active."""
    peft_model = DOORS["PeftModel.from_pretrained"](saved)
    peft_model.load_adapter(saved / "second", "second")
    base = load_adapter(saved)
    base.load_adapter(str(saved / "second"), adapter_name="second")
    for model, first in ((peft_model.eval(), "formal"), (base.eval(), "default")):
        model.set_adapter("second")
        torch.testing.assert_close(logits(model), logits(second_model()))
        model.set_adapter(first)
        torch.testing.assert_close(logits(model), logits(expected))
    peft_model.base_model.set_adapter(["formal", "second"])
    base.set_adapter(["default", "second"])
    assert sorted(base.active_adapters()) == ["default", "second"]
    torch.testing.assert_close(logits(base), logits(peft_model))
    assert not torch.allclose(logits(base), logits(expected), atol=1e-2)


@methods_of_bare_models
def test_adapters_of_a_bare_model(saved, tmp_path):
    """`add_adapter`, `set_adapter`, `active_adapters`, `disable_adapters`, `delete_adapter` of a bare model."""
    base = tiny_model()
    plain, plain_tokens = logits(base), generate(base)
    base.add_adapter(PSRConfig(alpha=0.8), "x")
    assert base.active_adapters() == ["x"]
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    assert trainable and all(".psr.psr_unit.x." in name for name in trainable)
    randomize(base, "psr_unit.x.", seed=1)
    steered_logits = logits(base)
    torch.testing.assert_close(steered_logits, logits(expected_model(alpha=0.8)))
    base.add_adapter(PSRConfig(layers_to_transform=[1, 2], positions="all"), "y")
    randomize(base, "psr_unit.y.", seed=7)
    assert base.active_adapters() == ["y"]
    torch.testing.assert_close(logits(base), logits(second_model()))
    base.set_adapter("x")
    assert torch.equal(logits(base), steered_logits)
    base.disable_adapters()
    assert torch.equal(logits(base), plain) and torch.equal(generate(base), plain_tokens)
    base.enable_adapters()
    assert torch.equal(logits(base), steered_logits)
    with pytest.raises(ValueError, match="formal"):
        base.set_adapter("formal")
    base.delete_adapter("y")
    assert torch.equal(logits(base), steered_logits)
    base.delete_adapter("x")
    assert torch.equal(logits(base), plain) and torch.equal(generate(base), plain_tokens)
    assert not any("psr_unit." in name for name in base.state_dict())


@methods_of_bare_models
def test_bare_model_saved(saved, tmp_path, expected):
    """`save_pretrained` of a transformers model with an adapter: the adapter alone, which every door takes again."""
    base = load_adapter(saved)
    base.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PSR"
    assert all(
        name.rsplit(".", 1)[1] in ("gate_weight", "gate_bias", "direction")
        for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(expected))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model(), tmp_path).eval()), logits(expected))


def test_strength_of_a_bare_model_is_its_configurations(saved, expected):
    """A transformers model has no `set_alpha`: the adapter's strength is `model.peft_config[name].alpha`."""
    base = load_adapter(saved)
    assert base.peft_config["default"].alpha == 0.8
    base.peft_config["default"].alpha = 2.0
    torch.testing.assert_close(logits(base), logits(expected, alpha=2.0))


@pytest.mark.parametrize("layout", ["llama", "gpt2", "gemma"])
def test_the_decoder_by_itself(layout):
    """The inner decoder called by itself works out its own masks, after any other call, also one that failed."""
    model = steered(tiny_model(layout))
    ids = torch.tensor(PROMPTS[:1])
    base = model.get_base_model()
    decoder = base.get_decoder()

    def last_states(**more):
        with torch.no_grad():
            return decoder(input_ids=ids, **more).last_hidden_state

    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
        masked = model(ids, steering_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(last_states(), expected) and torch.equal(last_states(), expected)
    assert torch.equal(last_states(steering_mask=torch.ones_like(ids)), masked) and not torch.equal(masked, expected)
    generate(model)
    assert torch.equal(last_states(), expected)
    with pytest.raises(TypeError, match="positional"):  # fails between the model's door and the decoder's
        base(ids, *[None] * 30, steering_mask=torch.ones_like(ids))
    assert torch.equal(last_states(), expected)


def test_unload_closes_the_doors(saved):
    """After `unload` the model's own `generate` stands again, and takes no `alpha` any more."""
    base = tiny_model()
    tokens = generate(base)
    model = steered(base)
    assert not torch.equal(generate(base), tokens)
    model.unload()
    assert "generate" not in base.__dict__ and torch.equal(generate(base), tokens)
    with pytest.raises(ValueError, match="alpha"):
        generate(base, alpha=1.0)


def test_closed_doors_name_psr(saved):
    """`PeftMixedModel` and hotswapping are closed to types that are not PEFT's own: each error names PSR."""
    documented = " ".join((DOCS / "layouts.md").read_text().split())
    with pytest.raises(ValueError, match="PSR"):
        get_peft_model(tiny_model(), PSRConfig(), mixed=True)
    with pytest.raises(ValueError, match="PSR") as error:
        PeftMixedModel.from_pretrained(tiny_model(), saved / "adapter")
    assert str(error.value) in documented
    mixed = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="PSR"):
        mixed.add_adapter("psr", PSRConfig())
    model = DOORS["PeftModel.from_pretrained"](saved)
    before = logits(model)
    with pytest.raises(ValueError, match="PSR") as error:
        hotswap_adapter(model, saved / "second", "formal")
    assert str(error.value) in documented
    with pytest.raises(ValueError, match="LoRA"):
        load_adapter(saved).load_adapter(str(saved / "second"), adapter_name="default", hotswap=True)
    assert torch.equal(logits(model), before)


@methods_of_bare_models
def test_beside_a_lora_on_a_bare_model(saved, tmp_path, expected):
    """A LoRA and a PSR adapter on one transformers model: alone, together, saved apart; equal names are refused."""
    torch.manual_seed(0)
    base = tiny_model()
    base.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "lora")
    only_lora = logits(base)
    base.load_adapter(str(saved / "adapter"), adapter_name="psr")
    with pytest.raises(ValueError, match="lora already exists"):
        base.add_adapter(PSRConfig(), "lora")
    base.set_adapter("psr")
    torch.testing.assert_close(logits(base), logits(expected))
    base.set_adapter("lora")
    torch.testing.assert_close(logits(base), only_lora)
    base.set_adapter(["lora", "psr"])
    both = logits(base)
    assert not torch.allclose(both, only_lora, atol=1e-2) and not torch.allclose(both, logits(expected), atol=1e-2)
    merged = copy.deepcopy(base)
    for module in merged.modules():
        if isinstance(module, LoraLayer):
            module.merge(adapter_names=["lora"])
    merged.set_adapter("psr")
    torch.testing.assert_close(both, logits(merged), atol=1e-3, rtol=1e-3)
    base.set_adapter("psr")
    base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PSR"
    assert all(".psr." in name for name in load_file(tmp_path / "adapter_model.safetensors"))


WITHOUT_IMPORT = """
import json, sys
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, pipeline
adapter, base = sys.argv[1:]
def load():
    return AutoModelForCausalLM.from_pretrained(base)
doors = {
    "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(load(), adapter),
    "PeftModel.load_adapter": lambda: get_peft_model(load(), LoraConfig()).load_adapter(adapter, "psr"),
    "AutoPeftModelForCausalLM.from_pretrained": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "PeftConfig.from_pretrained": lambda: PeftConfig.from_pretrained(adapter),
    "PeftMixedModel.from_pretrained": lambda: PeftMixedModel.from_pretrained(load(), adapter),
    "AutoModelForCausalLM.from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(adapter),
    "PreTrainedModel.load_adapter": lambda: load().load_adapter(adapter),
    "pipeline": lambda: pipeline("text-generation", model=adapter),
}
seen = {}
for name, door in doors.items():
    try:
        seen[name] = "opened: " + type(door()).__name__
    except Exception as error:
        seen[name] = f"{type(error).__name__}: {error}"
assert not any(name.startswith("peft_psr") for name in sys.modules)
print("\\n" + json.dumps(seen))
"""


def test_without_the_import_no_door_opens(saved, tmp_path):
    """Without `import peft_psr` every door fails, with the message that the documentation shows."""
    arguments = [sys.executable, "-c", WITHOUT_IMPORT, str(saved / "adapter"), str(saved / "base")]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len(seen) == 8 and set(seen.values()) == {"KeyError: 'PSR'"}, seen
    documented = (DOCS / "layouts.md").read_text()
    assert all(f"`{door}`" in documented for door in seen)
    assert "KeyError: 'PSR'" in documented
