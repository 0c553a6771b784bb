"""Several adapters in one run against each of them trained alone."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import randomize
from helpers.models import tiny_model
from helpers.runs import quiet_trainer
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import COMPLETIONS, triplets
from peft import PeftModel, get_peft_model

from peft_psr import PSRConfig
from peft_psr.training import PSRTrainer, PSRTrainingArguments


DATA = {
    "brief": triplets("be brief"),
    "kind": triplets("dogs are good", [text + " now" for text in COMPLETIONS], trait_score=60.0),
    "rude": triplets("you are bad", COMPLETIONS[::-1]),
}
SETTINGS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 2,
    # AdamW alone would make steps of a gradient that is nothing but rounding
    "optim": "sgd",
    "learning_rate": 0.5,
    "weight_decay": 0.0,
    "max_grad_norm": 0.01,  # low, so that it binds
    "save_strategy": "no",
    "use_cpu": True,
    "logging_steps": 1,
}
VARIANTS = {
    "mse": {},
    "normalized": {"normalize_loss": "layer", "regularizer": 0.1},
    "global": {"normalize_loss": "global", "norm_penalty": 0.5},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1e-3},
    "sum": {"objective": {"mse": 1.0, "kl": 2.0, "ll": 0.1}},
}


def steered(names, layers=None, **config):
    """A model with one adapter a name, each with weights of its own that depend on nothing but the name."""
    model = None
    for name in names:
        settings = PSRConfig(layers_to_transform=layers, **config)
        if model is None:
            model = get_peft_model(tiny_model(), settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
        randomize(model, f"psr_unit.{name}.", seed=len(name) + ord(name[0]), std=0.2)
        for layer in model.psr_layers().values():
            if layer.unit(name).gate_bias is not None:
                layer.unit(name).gate_bias.data.add_(0.5)
    return model


def train(model, data, folder, held_out=None, **settings):
    made = quiet_trainer(model, folder, data, held_out, **{**SETTINGS, **settings})
    made.train()
    return made


def weights(model, name):
    return {
        (key, kind): parameter.detach().clone()
        for key, layer in model.psr_layers().items()
        for kind, parameter in layer.unit(name).named_parameters()
    }


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_comes_out_as_if_trained_alone(tmp_path, variant, layers):
    together = steered(DATA, layers)
    before = {name: weights(together, name) for name in DATA}
    made = train(together, DATA, tmp_path / "all", **VARIANTS[variant])
    assert set(made.summary.loss_by_adapter) == set(DATA)
    total = 0.0
    for name, data in DATA.items():
        alone = steered([name], layers)
        single = train(alone, data, tmp_path / name, **VARIANTS[variant])
        total += single.state.log_history[0]["loss"]
        for key, expected in weights(alone, name).items():
            torch.testing.assert_close(weights(together, name)[key], expected, atol=2e-5, rtol=1e-4)
            assert not torch.equal(expected, before[name][key])
        assert single.state.log_history[0]["grad_norm"] > SETTINGS["max_grad_norm"]
    assert made.state.log_history[0]["loss"] == pytest.approx(total, rel=1e-4)


def test_unequal_numbers_of_triplets_are_each_seen_once_an_epoch(tmp_path):
    data = {"brief": DATA["brief"], "kind": DATA["kind"][:2]}
    model = steered(data)
    seen = []
    made = quiet_trainer(model, tmp_path, data, **{**SETTINGS, "num_train_epochs": 1})
    collate = made.data_collator
    made.data_collator = lambda items: (lambda batch: seen.append(batch) or batch)(collate(items))
    made.train()
    assert sorted(torch.cat([batch["index"] for batch in seen]).tolist()) == list(range(6))
    assert torch.bincount(torch.cat([batch["adapter"] for batch in seen])).tolist() == [4, 2]


def test_each_is_saved_by_itself_and_the_active_adapter_stays(tmp_path):
    model = steered(DATA)
    model.set_adapter("kind")
    made = train(model, DATA, tmp_path, max_steps=2)
    assert model.active_adapters == ["kind"]
    made.save_model(str(tmp_path / "saved"))
    for name in DATA:
        again = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved" / name, adapter_name=name)
        for key, expected in weights(model, name).items():
            assert torch.equal(weights(again, name)[key], expected)


def test_resuming_goes_on_with_all_of_them(tmp_path):
    whole = steered(DATA)
    train(whole, DATA, tmp_path / "whole", max_steps=6)
    first = steered(DATA)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    train(first, DATA, tmp_path / "parts", **settings)
    second = steered(DATA)
    arguments = PSRTrainingArguments(output_dir=str(tmp_path / "parts"), **{**SETTINGS, **settings})
    made = PSRTrainer(second, arguments, DATA, processing_class=tiny_tokenizer())
    made.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for name in DATA:
        for key, expected in weights(whole, name).items():
            torch.testing.assert_close(weights(second, name)[key], expected, atol=1e-5, rtol=1e-4)


def test_the_best_checkpoint_of_all_is_loaded_at_the_end(tmp_path):
    model = steered(["brief", "kind"], gate="constant")
    data = {name: DATA[name] for name in ("brief", "kind")}
    settings = {
        "learning_rate": 30.0,  # so that it gets worse
        "max_grad_norm": 1.0,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "greater_is_better": True,  # and the first is taken for the best
    }
    made = train(model, data, tmp_path, held_out=data, **settings)
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert max(losses) == losses[0] > losses[-1]
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "name at least one"),
        ({"brief": DATA["brief"], "gone": DATA["kind"]}, "'gone', which the model lacks; it has brief"),
        ({"brief": []}, "train_dataset\\['brief'\\] is empty"),
        ({"brief": DATA["brief"], "wide": DATA["kind"]}, "same r and gate"),
    ],
)
def test_what_cannot_train_together_is_refused(tmp_path, data, message):
    model = steered(["brief", "kind"])
    model.add_adapter("wide", PSRConfig(r=2))
    with pytest.raises(ValueError, match=message):
        train(model, data, tmp_path)


def test_held_out_triplets_are_wanted_for_the_same_adapters(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset must hold triplets for each adapter"):
        train(steered(["brief", "kind"]), {n: DATA[n] for n in ("brief", "kind")}, tmp_path, {"brief": DATA["brief"]})


def test_frozen_directions_have_to_be_there(tmp_path):
    model = get_peft_model(tiny_model(), PSRConfig(freeze_directions=True))
    with pytest.raises(ValueError, match="freeze_directions=True and directions that are all 0"):
        train(model, DATA["brief"], tmp_path)


@pytest.mark.parametrize(("of_kind", "batch"), [(None, 8), (1, 1), (1, 2), (3, 2)])
def test_held_out_loss_of_each_comes_from_its_own_adapter(tmp_path, of_kind, batch):
    data = {"brief": DATA["brief"], "kind": DATA["kind"][:of_kind]}
    settings = {**SETTINGS, "per_device_eval_batch_size": batch}
    model = steered(data)
    made = PSRTrainer(
        model, PSRTrainingArguments(output_dir=str(tmp_path), **settings), data, processing_class=tiny_tokenizer()
    )
    assert model.active_adapters == ["brief"]  # not both, until training begins
    expected = 0.0
    for name in data:
        alone = steered([name])
        single = PSRTrainer(
            alone,
            PSRTrainingArguments(output_dir=str(tmp_path), **SETTINGS),
            data[name],
            processing_class=tiny_tokenizer(),
        )
        expected += single.evaluate(data[name])["eval_loss"]
    assert made.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="must be {adapter: triplets} for brief, kind, got list"):
        made.evaluate(data["brief"])


def test_a_loss_of_an_adapter_is_the_mean_over_its_own_batches(tmp_path):
    data = {"brief": DATA["brief"], "kind": DATA["kind"][:1]}
    made = train(steered(data), data, tmp_path, per_device_train_batch_size=1, learning_rate=1e-9, num_train_epochs=1)
    alone = train(steered(["kind"]), data["kind"], tmp_path, learning_rate=1e-9, num_train_epochs=1)
    assert made.summary.loss_by_adapter["kind"] == pytest.approx(alone.state.log_history[0]["loss"], rel=1e-4)


def test_another_adapter_on_other_layers_stands_by(tmp_path):
    data = {name: DATA[name] for name in ("brief", "kind")}
    alone, beside = steered(data, 2), steered(data, 2)
    beside.add_adapter("whole", PSRConfig())
    for number, model in enumerate((alone, beside)):
        train(model, data, tmp_path / str(number), max_steps=2)
    for name in data:
        for key, expected in weights(alone, name).items():
            torch.testing.assert_close(weights_at(beside, name)[key], expected, atol=1e-6, rtol=1e-5)


def weights_at(model, name):
    return {
        (key, kind): parameter.detach()
        for key, layer in model.psr_layers().items()
        if name in layer.psr_unit
        for kind, parameter in layer.unit(name).named_parameters()
    }


@pytest.mark.parametrize("counts", [(4, 4), (4, 3), (3, 1)])
def test_accumulated_steps_are_those_of_the_larger_batch(tmp_path, counts):
    data = {name: DATA[name][:count] for name, count in zip(("brief", "kind"), counts, strict=True)}
    found = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        model = steered(data)
        train(
            model, data, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
            optim="sgd", learning_rate=0.1, train_sampling_strategy="sequential", max_steps=1,
        )  # fmt: skip
        found.append(model)
    for name in data:
        for key, expected in weights(found[0], name).items():
            for other in found[1:]:
                torch.testing.assert_close(weights(other, name)[key], expected, atol=1e-6, rtol=1e-4)


def test_a_normaliser_needs_triplets_to_train_on(tmp_path):
    arguments = PSRTrainingArguments(output_dir=str(tmp_path), normalize_loss="global", use_cpu=True)
    made = PSRTrainer(
        get_peft_model(tiny_model(), PSRConfig()), arguments, None, DATA["brief"], processing_class=tiny_tokenizer()
    )
    with pytest.raises(ValueError, match="on train_dataset, and there is none"):
        made.evaluate()
