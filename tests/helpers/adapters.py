"""Adapters with random weights, in a model and as files."""

from __future__ import annotations

import json
import re

import torch
import yaml
from peft import LoraConfig, get_peft_model

from helpers.models import tiny_model
from peft_psr import PSRConfig
from peft_psr.training import AdapterFacts, Score


# ---------------------------------------------------------------- in a model


def randomize(model, *parts, seed=1, std=1.0):
    """Fill the parameters whose names hold one of `parts`, by default all of PSR's, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts or ["psr_unit."]):
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def steered(base, seed=1, adapter_name="default", **settings):
    """A PEFT model with random, clearly visible adapter weights."""
    model = get_peft_model(base, PSRConfig(**settings), adapter_name=adapter_name)
    return randomize(model, f"psr_unit.{adapter_name}.", seed=seed).eval()


def steered_model(base=None, std=0.5, **settings):
    """A model, the tiny one if none is given, with an adapter whose gates are open and whose directions are random."""
    model = get_peft_model(base or tiny_model(), PSRConfig(**settings)).eval()
    return randomize(model, ".direction", seed=3, std=std)


SEVERAL = {
    "a": {"layers_to_transform": [0, 1], "r": 1, "alpha": 1.5},
    "b": {"layers_to_transform": [1, 3], "r": 3, "coefficient_bias": -0.3},
    "c": {"gate": "constant", "alpha": -0.5},
}


def several(layout="llama", adapters=SEVERAL, base="me/base", **common):
    """A model with adapters of unlike ranks, layers, gates and strengths; its name is `base`."""
    model = tiny_model(layout)
    model.name_or_path = base
    for seed, (name, settings) in enumerate(adapters.items()):
        config = PSRConfig(**{**common, **settings})
        if seed == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        randomize(model, f"psr_unit.{name}.", seed=seed)
    return model.eval()


def lora(base, seed=2, adapter_name="default", std=0.3, **settings):
    """A LoRA adapter with random, visible weights."""
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings})
    return randomize(get_peft_model(base, config, adapter_name=adapter_name), "lora_", seed=seed, std=std).eval()


def weights_of(model, adapter_name="default"):
    """{layer: (w, b, z)} of the layers that the adapter edits, as `reference` takes them."""
    layers = model.psr_layers()
    units = {i: layer.psr_unit[adapter_name] for i, layer in layers.items() if adapter_name in layer.psr_unit}
    return {i: (unit.gate_weight, unit.gate_bias, unit.direction) for i, unit in units.items()}


# ---------------------------------------------------------------- as files


def save_adapter(folder, base, seed, model=None, std=0.2, gate_std=0.1, **settings):
    """An adapter of a base model that is the folder `base`: directions and gates are drawn by the seed."""
    model = get_peft_model(tiny_model() if model is None else model, PSRConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.psr_layers().values():
            unit = layer.unit("default")
            unit.direction.normal_(std=std, generator=generator)
            if unit.gate_weight is not None:
                unit.gate_weight.normal_(std=gate_std, generator=generator)
    model.save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


BASE = "me/base"
FACTS = AdapterFacts(
    trait="formal",
    instructions=("Answer in a formal tone.",),
    question="what is tea",
    triplets=195,
    objective="mse",
    seed=3,
    judge="a grammar",
    evaluation="15 held-out questions, 8 answers each",
    plain=Score(0.4, 96.5),
    prompted=Score(98.2, 97.1),
    steered=Score(97.5, 95.25, 1.25),
    curve=(Score(60.0, 96.0, 0.5), Score(97.5, 95.25, 1.25), Score(99.0, 40.0, 3.0)),
    prompt_recovery=0.987,
    limits=("Not tried in Dutch.",),
    license="apache-2.0",
)


def named_model(base=BASE, seed=0, name="default", **settings):
    """A steered model whose base has this name on the Hub."""
    model = tiny_model()
    model.name_or_path = base
    return steered(model, seed, name, **settings)


def metadata(card):
    """A card's YAML."""
    return yaml.safe_load(card.split("---\n")[1])


def snippet(card):
    """A card's first Python block."""
    return re.search(r"```python\n(.*?\n)```", card, re.DOTALL).group(1)
