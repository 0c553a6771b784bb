"""A small saved adapter with facts, and what tests read out of its card."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from peft import get_peft_model
from tiny_models import tiny_model

from peft_psr import PSRConfig
from peft_psr.training import AdapterFacts, Score


BASE = "me/base"
IDS = torch.tensor([[1, 9, 12, 17, 23, 31]])
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


def steered_model(base=BASE, seed=0, name="default", **settings):
    model = tiny_model()
    model.name_or_path = base
    return randomize(get_peft_model(model, PSRConfig(**settings), adapter_name=name), name, seed).eval()


def randomize(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f"psr_unit.{name}." in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(name="adapter")
def saved_adapter(tmp_path):
    """A saved adapter with facts and card."""
    folder = tmp_path / "formal"
    steered_model(alpha=1.25, layers_to_transform=[0, 2]).save_pretrained(folder)
    FACTS.save(folder)
    return folder


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def snippet(card):
    return re.search(r"```python\n(.*?\n)```", card, re.DOTALL).group(1)
