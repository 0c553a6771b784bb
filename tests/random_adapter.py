"""A saved adapter with random weights, on a base model that is a folder."""

from __future__ import annotations

import json

import torch
from peft import get_peft_model
from tiny_models import tiny_model

from peft_psr import PSRConfig


def save_adapter(folder, base, seed, model=None, std=0.2, gate_std=0.1, **settings):
    """Directions and gates are drawn by the seed, with these standard deviations."""
    model = get_peft_model(tiny_model() if model is None else model, PSRConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in model.psr_layers().values():
            unit = layer.unit("default")
            unit.direction.normal_(std=std)
            if unit.gate_weight is not None:
                unit.gate_weight.normal_(std=gate_std)
    model.save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
