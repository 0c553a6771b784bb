"""What is kept of the frozen model gives what computing it anew gives, and is computed once."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from helpers.layouts import DECODERS
from helpers.models import LAYERS, tiny_model
from helpers.runs import fresh_trainer, trained
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import SIX, triplets
from peft import get_peft_model

from peft_psr import PSRConfig
from peft_psr.training import PSRTrainer, PSRTrainingArguments
from peft_psr.training.passes.activation_cache import ActivationCache


@pytest.mark.parametrize("objective", ["mse", "ll", "kl"])
@pytest.mark.parametrize("layers", [None, 2])
def test_kept_activations_change_nothing(tmp_path, objective, layers):
    plain, _ = trained(tiny_model(), tmp_path, layers, objective=objective, teacher_cache="none")
    for place in ("memory", "disk"):
        kept, made = trained(tiny_model(), tmp_path, layers, objective=objective, teacher_cache=place)
        assert made.summary.teacher_cache == place
        for ours, theirs in zip(kept, plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not list(tmp_path.glob(".activations*"))


def count_calls(model):
    counts = [0] * LAYERS
    for i, layer in enumerate(model.get_base_model().model.layers):

        def count(*_, i=i):
            counts[i] += 1

        layer.self_attn.register_forward_hook(count)
    return counts


def test_each_layer_runs_as_often_as_it_has_to(tmp_path):
    made = fresh_trainer(tiny_model(), tmp_path, layers=2, teacher_cache="memory")
    counts = count_calls(made.model)
    made.train()
    # 3 epochs of 3 steps: the student needs the layer above the edited one each time; the first epoch computes
    # the teacher (all layers) and the stream up to layer 2; one step checks the short way against the whole (layers
    # 0-3, and 3 again); two calls of one token tell what the layers return
    assert counts == [3 + 3 + 1 + 2, 3 + 3 + 1 + 2, 3 + 3 + 1 + 2, 9 + 3 + 2 + 2]
    made = fresh_trainer(tiny_model(), tmp_path, layers=2, teacher_cache="none")
    counts = count_calls(made.model)
    made.train()
    assert counts == [9 + 9] * 4


@pytest.mark.parametrize("layout", DECODERS)
def test_every_layout_can_start_above_the_first_edit(layout, tmp_path, caplog):
    base = DECODERS[layout]().eval()
    if layout == "gemma3 multimodal":
        pytest.skip("a model of text and images gets no triplets")
    with caplog.at_level(logging.WARNING):
        kept, made = trained(base, tmp_path, 1, objective={"mse": 1.0, "kl": 1.0}, num_train_epochs=2)
    assert made.summary.teacher_cache == "memory" and "from the middle" not in caplog.text
    made.model.unload()
    plain, _ = trained(base, tmp_path, 1, objective={"mse": 1.0, "kl": 1.0}, num_train_epochs=2, teacher_cache="none")
    for ours, theirs in zip(kept, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_model_that_cannot_start_in_the_middle_is_computed_whole(tmp_path, caplog):
    class Remembers(torch.nn.Module):
        """Adds what the layer before it was given, which is not in its own input."""

        def __init__(self, layer, memory):
            super().__init__()
            self.layer, self.memory = layer, memory

        def forward(self, hidden, *args, **kwargs):
            self.memory.append(hidden)
            return self.layer(hidden, *args, **kwargs) + self.memory[-2 if len(self.memory) > 1 else -1]

    def odd():
        base = tiny_model()
        memory = []
        base.model.register_forward_pre_hook(lambda *_: memory.clear())
        for i, layer in enumerate(base.model.layers):
            base.model.layers[i] = Remembers(layer, memory)
        return base

    plain, _ = trained(odd(), tmp_path, 2, teacher_cache="none")
    with caplog.at_level(logging.WARNING):
        kept, _ = trained(odd(), tmp_path, 2, teacher_cache="memory")
    assert "can't be run from the middle" in caplog.text
    for ours, theirs in zip(kept, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_modes_that_go_another_way(tmp_path, setting):
    plain, _ = trained(tiny_model(), tmp_path, 1, teacher_cache="none", **setting)
    kept, _ = trained(tiny_model(), tmp_path, 1, teacher_cache="memory", **setting)
    for ours, theirs in zip(kept, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2 if "bf16" in setting else 1e-5, rtol=1e-2)


def test_what_does_not_fit_is_said(tmp_path, caplog):
    settings = {"teacher_cache_gb": 1e-9, "max_steps": 1}
    with caplog.at_level(logging.INFO):
        _, made = trained(tiny_model(), tmp_path, **settings)
    assert made.summary.teacher_cache == "none" and "more than teacher_cache_gb=1e-09" in caplog.text
    for place in ("memory", "disk"):
        with pytest.raises(ValueError, match="Raise the budget"):
            trained(tiny_model(), tmp_path, teacher_cache=place, **settings)
    with pytest.raises(ValueError, match="teacher_cache must be one of"):
        fresh_trainer(tiny_model(), tmp_path, teacher_cache="gpu")


def test_held_out_triplets_are_kept_beside_the_others(tmp_path):
    settings = {"eval_strategy": "epoch", "per_device_eval_batch_size": 3, "num_train_epochs": 2}
    losses = []
    for place in ("none", "memory"):
        made = fresh_trainer(tiny_model(), tmp_path, None, triplets("dogs are good"), teacher_cache=place, **settings)
        made.train()
        losses.append([entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("on_disk", [False, True])
def test_cache_gives_back_what_was_put_in(tmp_path, on_disk):
    cache = ActivationCache([2, 3, 1], ["a", "b"], 4, torch.bfloat16, tmp_path if on_disk else None)
    first = {name: torch.randn(4, 4, dtype=torch.bfloat16) for name in "ab"}
    cache.put(torch.tensor([1, 2]), first)
    assert cache.holds(torch.tensor([0, 2, 1])).tolist() == [False, True, True]
    devices = dict.fromkeys("ab", torch.device("cpu"))
    turned = cache.get(torch.tensor([2, 1]), devices)
    for name in "ab":
        assert torch.equal(turned[name], first[name][[3, 0, 1, 2]])
    assert os.name == "nt" or not list(tmp_path.iterdir())  # a killed process leaves no file either


def test_edits_inside_the_layers_below_are_not_left_out(tmp_path):
    results = []
    for place in ("none", "auto"):
        torch.manual_seed(3)
        model = get_peft_model(
            tiny_model(), PSRConfig(target_modules=r".*layers\.(0\.mlp|2)", init_weights=False, task_type="CAUSAL_LM")
        )
        with torch.no_grad():
            for layer in model.psr_layers().values():
                layer.unit("default").gate_bias.fill_(1.0)
        arguments = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, teacher_cache=place)
        made = PSRTrainer(model, arguments, SIX, processing_class=tiny_tokenizer())
        loss = made.compute_loss(model, made.data_collator(made.train_dataset))
        loss.backward()
        inner = next(layer for layer in model.psr_layers().values() if layer.name.endswith("mlp"))
        results.append((loss.item(), inner.unit("default").direction.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)


def test_the_teacher_of_kl_has_the_head_as_it_was(tmp_path):
    model = get_peft_model(tiny_model(), PSRConfig(modules_to_save=["lm_head"], layers_to_transform=2))
    arguments = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, objective="kl")
    made = PSRTrainer(model, arguments, SIX, processing_class=tiny_tokenizer())
    batch = made.data_collator(SIX[:1])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(-1.0)
    got = made.compute_loss(model, batch).item()
    n = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        q = model(batch["input_ids"]).logits[0, -n - 1 : -1].log_softmax(-1)
        with model.disable_adapter():
            p = model(batch["teacher_input_ids"]).logits[0, -n - 1 : -1].log_softmax(-1)
    assert got == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_a_changed_base_model_is_looked_at_again(tmp_path):
    made = fresh_trainer(tiny_model(), tmp_path, 2, SIX[:3], normalize_loss="global")
    made.evaluate()
    made.train()
    with torch.no_grad():
        made.model.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(3.0)
        for layer in made.model.psr_layers().values():
            layer.unit("default").direction.zero_()
    assert made.evaluate()["eval_loss"] != pytest.approx(1.0, rel=1e-2)  # divided by what the old model lost
    made.args.learning_rate = 0.0
    made.train()
    losses = [made.compute_loss(made.model, made.data_collator([row])).item() for row in made.train_dataset]
    assert sum(losses) / len(losses) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(("objective", "layers"), [("mse", None), ("kl", 2)])
def test_only_what_is_missing_is_computed(tmp_path, objective, layers):
    # as in a run of several processes, where each epoch deals the triplets anew
    frozen = []
    for place in ("memory", "none"):
        made = fresh_trainer(tiny_model(), tmp_path, layers, objective=objective, teacher_cache=place)
        frozen.append((made._frozen_model(made.model), made))
    (kept, made), (anew, other) = frozen
    rows = {id(model): 0 for model in (made.model, other.model)}
    for model in (made.model, other.model):
        first = model.get_base_model().model.embed_tokens

        def count(module, args, output, model=model):
            rows[id(model)] += len(output)

        first.register_forward_hook(count)
    for chosen in ([0, 1], [1, 2], [2, 0, 3], [3, 1]):
        batch = made.data_collator([made.train_dataset[i] for i in chosen])
        ours, expected = kept.teacher(batch), anew.teacher(batch)
        for name, hidden in expected.items():
            torch.testing.assert_close(ours[name], hidden, atol=1e-5, rtol=1e-4)
    assert rows[id(other.model)] == 9 and rows[id(made.model)] == 4
    if layers is not None:
        for chosen in ([0, 1], [1, 2]):
            batch = made.data_collator([made.train_dataset[i] for i in chosen])
            flat = kept._stream_of(batch)
            assert len(flat) == batch["attention_mask"].sum()
        assert rows[id(made.model)] == 4 + 3 + 1  # and one token to learn what layers return
