"""Training that is stopped, resumed, cut short, or goes wrong."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.models import tiny_model
from helpers.runs import adapter_weights, quiet_trainer
from helpers.triplets import SIX, triplets
from peft import get_peft_model
from transformers import EarlyStoppingCallback

from peft_psr import PSRConfig
from peft_psr.training import TrainingSummary


NEUTRAL = triplets(instruction="", trait_score=0.0)


def made_trainer(folder, data=SIX, held_out=None, model=None, callbacks=None, **settings):
    torch.manual_seed(5)
    if model is None:
        model = get_peft_model(tiny_model(), PSRConfig(init_weights=False), adapter_name=settings.pop("name", "mild"))
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **settings}
    return quiet_trainer(model, folder, data, held_out, callbacks, **settings)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["default", "mild"])
@pytest.mark.parametrize("settings", [{}, {"objective": "kl", "train_sampling_strategy": "group_by_length"}])
def test_resumed_after_a_stop_equals_uninterrupted(tmp_path, name, settings):
    whole = made_trainer(tmp_path / "whole", name=name, **settings)
    whole.train()
    saving = {**settings, "save_strategy": "steps", "save_steps": 2, "name": name}
    first = made_trainer(tmp_path / "parts", **saving)
    step = first.training_step

    def until_killed(*args, **kwargs):
        if first.state.global_step == 7:
            raise Killed
        return step(*args, **kwargs)

    first.training_step = until_killed
    with pytest.raises(Killed):
        first.train()
    second = made_trainer(tmp_path / "parts", **saving)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step == 12
    for ours, theirs in zip(adapter_weights(second.model), adapter_weights(whole.model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    made_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    other = made_trainer(tmp_path, name="wild")
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_early_stopping_keeps_the_best_adapter(tmp_path):
    made = made_trainer(
        tmp_path, held_out=triplets("be brief", ["dogs", "a b"]), num_train_epochs=30,
        model=get_peft_model(tiny_model(), PSRConfig(gate="constant"), adapter_name="mild"),
        optim="sgd", learning_rate=30.0,  # so that it gets worse
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, save_total_limit=1,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    made.train()
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(losses) < 30 and min(losses) < losses[-1]
    assert made.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("where", ["student", "teacher", "head"])
def test_a_loss_that_is_not_finite_names_step_layer_and_triplet(tmp_path, where):
    made = made_trainer(tmp_path, objective={"mse": 1.0, "kl": 1.0}, train_sampling_strategy="sequential")
    base = made.model.get_base_model()
    word = made.processing_class.convert_tokens_to_ids("dogs")  # in triplets 2 and 4
    seen = {}
    base.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)

    def spoil(module, args, output):
        ids, with_system = seen["input_ids"], seen["input_ids"].shape[1] > 12
        if made.state.global_step < 3 or ids.shape[1] == 1 or with_system != (where == "teacher"):
            return output
        return output.masked_fill((ids == word)[..., None], float("inf"))

    if where == "head":
        base.lm_head.register_forward_hook(lambda m, a, o: o * float("nan") if made.state.global_step >= 3 else o)
        expected = r"Step 3: the loss of objective 'kl' is not finite on train_dataset\[0\]"
    else:
        base.model.layers[1].register_forward_hook(spoil)
        whose = {"student": "steered", "teacher": "prompted"}[where]
        expected = rf"Step \d: the {whose} model's activations at layer 1 are not finite on train_dataset\[2\]"
    made.args.teacher_cache = "none"
    with pytest.raises(FloatingPointError, match=expected):
        made.train()


def test_summary_and_tensorboard(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = made_trainer(tmp_path, report_to="tensorboard", regularizer=0.1, norm_penalty=0.1)
    made.train()
    files = list(tmp_path.rglob("events.out.tfevents*"))
    events = loader.EventAccumulator(str(files[0].parent))
    events.Reload()
    assert {"train/mse/layer_0", "train/mse/layer_3", "train/live_gates"} <= set(events.Tags()["scalars"])

    summary = made.summary
    assert isinstance(summary, TrainingSummary) and summary.steps == 12 and summary.seconds > 0
    assert set(summary.losses) == {"mse", "regularizer", "norm_penalty"}
    assert set(summary.loss_by_layer) == {"0", "1", "2", "3"} and summary.loss_by_adapter == {}
    assert sum(summary.loss_by_layer.values()) == pytest.approx(summary.losses["mse"], rel=1e-4)
    last = [entry for entry in made.state.log_history if "mse" in entry][-3:]
    assert summary.losses["mse"] == pytest.approx(sum(entry["mse"] for entry in last) / 3, rel=1e-4)
    assert summary.peak_memory_bytes > 50e6 and TrainingSummary(**summary.to_json()) == summary


def test_gate_sparsity_is_the_share_of_closed_gates(tmp_path):
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=[0, 2]))
    unit = model.psr_layers()[2].unit("default")
    with torch.no_grad():
        unit.gate_bias.fill_(-1e4)
    made = made_trainer(tmp_path, model=model, num_train_epochs=1, learning_rate=0.0)
    made.train()
    assert made.summary.gate_sparsity == 0.5 and made.summary.live_gates == 0.5
    assert made.summary.dead_gates == ["layer 2, gate 0"]


# ---------------------------------------------------------------- neutral triplets


def test_neutral_triplets_pull_the_edit_to_nothing_there_and_weigh_what_they_should(tmp_path):
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        made = made_trainer(tmp_path, neutral_weight=weight, regularizer=0.0)
        batch = made.data_collator([*SIX[:2], *NEUTRAL[:2]])
        losses[weight] = made.compute_loss(made.model, batch).item()
    batch = made.data_collator(NEUTRAL[:2])
    assert batch["neutral"].all() and batch["alpha"].tolist() == [1.0, 1.0]
    assert not made.data_collator(SIX[:2])["neutral"].any()
    assert losses[1.0] > losses[0.0]
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * (losses[1.0] - losses[0.0]), rel=1e-4)
    alone = made_trainer(tmp_path)
    expected = sum(alone.compute_loss(alone.model, alone.data_collator([row])).item() for row in NEUTRAL[:2]) / 4
    assert losses[1.0] - losses[0.0] == pytest.approx(expected, rel=1e-4)


def test_neutral_triplets_leave_normaliser_and_regulariser_alone(tmp_path):
    settings = {"normalize_loss": "layer", "regularizer": 0.1}
    plain = made_trainer(tmp_path, data=SIX, **settings)
    mixed = made_trainer(tmp_path, data=[*SIX, *NEUTRAL], **settings)
    batch = plain.data_collator(SIX)
    plain.compute_loss(plain.model, batch)
    mixed.compute_loss(mixed.model, batch)
    for name, value in plain.normalizers["mse"].items():
        torch.testing.assert_close(mixed.normalizers["mse"][name], value)
    model = get_peft_model(tiny_model(), PSRConfig())  # a no-op: nothing is lost on neutral triplets
    made = made_trainer(tmp_path, data=[*SIX, *NEUTRAL], model=model, **settings)
    with torch.no_grad():
        for layer in model.psr_layers().values():
            layer.unit("default").gate_bias.fill_(-1.0)  # every hinge pulls, on triplets that count
    assert made.compute_loss(model, made.data_collator(NEUTRAL)).item() == 0.0


def test_evaluation_before_training_logs_nothing_of_it(tmp_path, caplog):
    made = made_trainer(tmp_path, held_out=SIX[:2])
    with caplog.at_level(logging.WARNING):
        assert made.evaluate()["eval_loss"] > 0
    assert made.summary is None
