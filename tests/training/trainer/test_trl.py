"""TRL's trainers take `PSRConfig` as they take any adapter of PEFT. Runs where TRL is installed."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import PeftModel
from safetensors.torch import load_file

from peft_psr import PSRConfig


trl = pytest.importorskip("trl")

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
}


def turn(role, text):
    return [{"role": role, "content": text}]


def sft(arguments, **common):
    rows = [{"prompt": turn("user", "what is tea"), "completion": turn("assistant", "tea is good")}] * 4
    return trl.SFTTrainer(args=trl.SFTConfig(**arguments), train_dataset=Dataset.from_list(rows), **common)


def dpo(arguments, **common):
    row = {
        "prompt": turn("user", "what is tea"),
        "chosen": turn("assistant", "tea is good"),
        "rejected": turn("assistant", "dogs are good"),
    }
    return trl.DPOTrainer(args=trl.DPOConfig(**arguments), train_dataset=Dataset.from_list([row] * 4), **common)


def grpo(arguments, **common):
    def even(completion_ids, **_):
        return [float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]

    config = trl.GRPOConfig(**arguments, num_generations=2, max_completion_length=6, beta=0.0)
    rows = Dataset.from_list([{"prompt": turn("user", "what is tea")}] * 4)
    return trl.GRPOTrainer(args=config, train_dataset=rows, reward_funcs=even, **common)


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_adapter_moves_and_nothing_else_and_loads_as_it_was_saved(kind, tmp_path):
    base = tiny_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = PSRConfig(layers_to_transform=[0, 1], init_weights=False)
    torch.manual_seed(0)
    trainer = TRAINERS[kind](
        {"output_dir": str(tmp_path / "out"), **SETTINGS},
        model=base,
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )
    model = trainer.model
    start = {name: value.clone() for name, value in model.named_parameters() if ".psr_unit." in name}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == set(start)
    trainer.train()
    moved = {name for name, value in model.named_parameters() if name in start and not torch.equal(value, start[name])}
    assert moved == set(start) and len(start) == 6
    own = {name: value for name, value in model.get_base_model().state_dict().items() if ".psr." not in name}
    assert own.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in own.items())
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    loaded = {name.replace(".default", ""): value for name, value in again.named_parameters() if ".psr_unit." in name}
    trained = {name.replace(".default", ""): value for name, value in model.named_parameters() if name in start}
    assert saved.keys() == loaded.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) and torch.equal(loaded[name], saved[name]) for name in saved)
