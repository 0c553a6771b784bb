"""Both branches, the whole loss against its formula, the Trainer, mistakes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapters import randomize
from helpers.models import tiny_model
from helpers.runs import quiet_trainer
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft import get_peft_model
from transformers import HfArgumentParser, TrainingArguments

from peft_psr import PSRConfig
from peft_psr.training import PSRTrainer, PSRTrainingArguments, TripletCollator
from peft_psr.training.passes.branches import layers_downstream, run_branch


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
def test_empty_instruction_gives_exactly_zero_difference(positions):
    model = get_peft_model(tiny_model(), PSRConfig(positions=positions))
    batch = TripletCollator(tiny_tokenizer(), positions)(triplets(instruction=""))
    layers = layers_downstream(model)
    teacher, base = (run_branch(model, batch, layers, branch).hidden for branch in ("teacher", "base"))
    assert all(torch.equal(teacher[name], base[name]) for name in layers)
    changed = TripletCollator(tiny_tokenizer(), positions)(triplets())
    teacher, base = (run_branch(model, changed, layers, branch).hidden for branch in ("teacher", "base"))
    assert not any(torch.equal(teacher[name], base[name]) for name in layers)


def test_branches_equal_unpadded_runs_of_the_plain_model():
    base = tiny_model()
    model = randomize(get_peft_model(copy.deepcopy(base), PSRConfig()), seed=7, std=0.3)
    collator = TripletCollator(tiny_tokenizer())
    batch = collator(triplets())
    layers = layers_downstream(model)
    teacher = run_branch(model, batch, layers, "teacher").hidden[layers[1]]
    expected = []
    for triplet in triplets():
        row = collator.encode(triplet)
        hidden = base(torch.tensor([row["teacher_input_ids"]]), output_hidden_states=True).hidden_states[2][0]
        expected.append(hidden[-row["mask_length"] :])
    torch.testing.assert_close(teacher, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert not teacher.requires_grad


def test_last_layer_is_taken_before_the_final_norm():
    model = get_peft_model(tiny_model(), PSRConfig())
    batch = TripletCollator(tiny_tokenizer())(triplets(completions=["yes"]))
    layers = layers_downstream(model)
    seen = []
    handle = model.get_base_model().model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hidden = run_branch(model, batch, layers, "base").hidden[layers[-1]]
    handle.remove()
    assert torch.equal(hidden, seen[0][batch["steering_mask"].bool()])


def test_single_layer_loss_covers_that_layer_and_all_below_the_output():
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=2))
    assert [name.rsplit(".", 1)[1] for name in layers_downstream(model)] == ["2", "3"]


def test_only_the_active_adapter_says_where_the_loss_begins():
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=0), adapter_name="a")
    model.add_adapter("b", PSRConfig(layers_to_transform=2))
    model.set_adapter("b")
    assert [name.rsplit(".", 1)[1] for name in layers_downstream(model)] == ["2", "3"]


def test_weights_stay_trainable_in_the_teachers_pass():
    model = get_peft_model(tiny_model(), PSRConfig())
    weights = [parameter for name, parameter in model.named_parameters() if "psr_unit" in name]
    seen = []
    model.get_base_model().register_forward_pre_hook(lambda *_: seen.append([w.requires_grad for w in weights]))
    run_branch(model, TripletCollator(tiny_tokenizer())(triplets()), layers_downstream(model), "teacher")
    assert len(seen) == 1 and all(seen[0]) and all(w.requires_grad for w in weights)


def test_dropout_does_not_disturb_the_branches():
    base = tiny_model("gpt2")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = get_peft_model(base, PSRConfig()).train()
    batch = TripletCollator(tiny_tokenizer())(triplets(instruction=""))
    layers = layers_downstream(model)
    teacher, plain = (run_branch(model, batch, layers, branch).hidden for branch in ("teacher", "base"))
    assert all(torch.equal(teacher[name], plain[name]) for name in layers) and model.training


# ---------------------------------------------------------------- objectives


def test_trainer_loss_is_the_formula(tmp_path):
    base = tiny_model()
    model = randomize(get_peft_model(copy.deepcopy(base), PSRConfig(alpha=0.5)), seed=7, std=0.3)
    made = quiet_trainer(model, tmp_path, regularizer=0.1)
    batch = made.data_collator(triplets())
    loss = made.compute_loss(model, batch).item()

    expected = 0.0
    collator = TripletCollator(tiny_tokenizer())
    for triplet in triplets():
        row = collator.encode(triplet)
        n = row["mask_length"]
        teacher = base(torch.tensor([row["teacher_input_ids"]]), output_hidden_states=True)
        last = []
        handle = model.get_base_model().model.norm.register_forward_pre_hook(lambda m, a, last=last: last.append(a[0]))
        ids = torch.tensor([row["input_ids"]])
        mask = torch.zeros_like(ids)
        mask[0, -n:] = 1
        student = model(ids, steering_mask=mask, alpha=0.8, output_hidden_states=True)
        handle.remove()
        handle = base.model.norm.register_forward_pre_hook(lambda m, a, last=last: last.append(a[0]))
        base(torch.tensor([row["teacher_input_ids"]]))
        handle.remove()
        pairs = list(zip(student.hidden_states[1:-1], teacher.hidden_states[1:-1], strict=True)) + [tuple(last)]
        for ours, theirs in pairs:
            expected += (ours[0, -n:] - theirs[0, -n:]).square().mean().item() / 4
        for gates in model.gate_values(ids, steering_mask=mask, alpha=0.8).values():
            expected += 0.1 * max(0.0, 1.0 - gates[0, -n:].sum().item()) / 4
    assert loss == pytest.approx(expected, rel=1e-4)


def test_objectives_are_weighed(tmp_path):
    model = randomize(get_peft_model(tiny_model(), PSRConfig()), seed=7, std=0.3)
    losses = {}
    for objective in ("mse", "ll", "kl", {"mse": 2.0, "ll": 0.5, "kl": 3.0}):
        made = quiet_trainer(model, tmp_path, objective=objective)
        losses[str(objective)] = made.compute_loss(model, made.data_collator(triplets())).item()
    expected = 2 * losses["mse"] + 0.5 * losses["ll"] + 3 * losses["kl"]
    assert losses["{'mse': 2.0, 'll': 0.5, 'kl': 3.0}"] == pytest.approx(expected, rel=1e-5)


def test_accumulated_gradients_equal_the_larger_batch(tmp_path):
    weights = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = randomize(get_peft_model(tiny_model(), PSRConfig(layers_to_transform=1)), seed=7, std=0.3)
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        quiet_trainer(model, tmp_path, max_steps=3, **settings).train()
        weights.append(model.psr_layers()[1].unit("default").direction.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalize", ["global", "layer"])
def test_normalized_loss_is_one_without_an_edit(tmp_path, normalize):
    model = get_peft_model(tiny_model(), PSRConfig())  # starts as a no-op
    made = quiet_trainer(model, tmp_path, normalize_loss=normalize, per_device_eval_batch_size=3)  # the set is 4
    assert made.compute_loss(model, made.data_collator(triplets())).item() == pytest.approx(1.0, rel=1e-5)


# ---------------------------------------------------------------- the Trainer


@pytest.mark.parametrize("objective", ["mse", "ll", "kl", {"mse": 1.0, "ll": 0.1}])
@pytest.mark.parametrize("layers", [None, 1])
def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path, objective, layers):
    base = tiny_model()
    frozen = copy.deepcopy(base.state_dict())
    settings = {
        "objective": objective,
        "num_train_epochs": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
    }
    made = quiet_trainer(get_peft_model(base, PSRConfig(layers_to_transform=layers)), tmp_path, **settings)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2])
    after = made.model.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_reported_settings_are_the_defaults(tmp_path):
    made = PSRTrainingArguments(output_dir=str(tmp_path))
    assert (made.learning_rate, made.weight_decay, made.per_device_train_batch_size) == (1e-3, 1e-6, 1)
    assert (made.num_train_epochs, made.data_seed, made.lr_scheduler_type, made.warmup_steps) == (15, 123, "linear", 0)
    for likelihood in ("ll", {"ll": 1}, '{"ll": 1.0, "mse": 0}'):
        assert PSRTrainingArguments(output_dir=str(tmp_path), objective=likelihood).num_train_epochs == 7
    assert made.report_to in ([], "none", ["none"])


def test_arguments_from_the_command_line(tmp_path):
    words = [
        "--output_dir",
        str(tmp_path),
        "--objective",
        '{"mse": 1, "ll": 0.5}',
        "--alpha",
        "0.5",
        "--regularizer",
        "0.1",
    ]
    (made,) = HfArgumentParser(PSRTrainingArguments).parse_args_into_dataclasses(words)
    assert made.objective_weights == {"mse": 1.0, "ll": 0.5} and made.alpha == 0.5 and made.num_train_epochs == 15


def test_logs_show_layers_and_live_gates(tmp_path):
    made = quiet_trainer(get_peft_model(tiny_model(), PSRConfig(layers_to_transform=2)), tmp_path, num_train_epochs=1)
    made.train()
    log = next(entry for entry in made.state.log_history if "loss" in entry)
    assert log["live_gates"] == 1.0
    assert {"mse", "mse/layer_2", "mse/layer_3"} <= set(log) and "mse/layer_1" not in log
    assert log["mse/layer_2"] + log["mse/layer_3"] == pytest.approx(log["loss"], rel=1e-3)
    assert made.dead_gates == []


def test_a_dead_gate_is_reported(tmp_path, caplog):
    model = get_peft_model(tiny_model(), PSRConfig(layers_to_transform=[0, 2]))
    with torch.no_grad():
        model.psr_layers()[2].psr_unit["default"].gate_bias.fill_(-1e4)
    made = quiet_trainer(model, tmp_path, num_train_epochs=1)
    made.train()
    assert made.dead_gates == ["layer 2, gate 0"]
    assert "layer 2, gate 0" in caplog.text
    assert next(entry for entry in made.state.log_history if "loss" in entry)["live_gates"] == 0.5


def test_evaluation_loss(tmp_path):
    model = get_peft_model(tiny_model(), PSRConfig())
    arguments = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=4)
    made = PSRTrainer(model, arguments, triplets(), eval_dataset=triplets(), processing_class=tiny_tokenizer())
    loss = made.compute_loss(model, made.data_collator(triplets())).item()
    assert made.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_datasets_and_peft_config_as_in_trl(tmp_path):
    datasets = pytest.importorskip("datasets")
    arguments = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", max_steps=2)
    made = PSRTrainer(
        tiny_model(),
        arguments,
        datasets.Dataset.from_list(triplets()),
        processing_class=tiny_tokenizer(),
        peft_config=PSRConfig(r=2),
    )
    made.train()
    assert made.model.peft_config["default"].r == 2


def test_an_instruction_without_effect_is_an_error_when_normalizing(tmp_path):
    made = quiet_trainer(get_peft_model(tiny_model(), PSRConfig()), tmp_path, triplets(""), normalize_loss="global")
    with pytest.raises(ValueError, match="changes nothing"):
        made.train()


# ---------------------------------------------------------------- mistakes


def test_empty_dataset(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        quiet_trainer(get_peft_model(tiny_model(), PSRConfig()), tmp_path, data=[])


def test_copies_on_several_gpus_are_refused(tmp_path):
    arguments = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="sees 2 GPUs.*accelerate launch"):
        PSRTrainer(get_peft_model(tiny_model(), PSRConfig()), arguments, triplets(), processing_class=tiny_tokenizer())


def test_model_without_adapter(tmp_path):
    with pytest.raises(TypeError, match="PEFT model with a PSR adapter, got LlamaForCausalLM"):
        quiet_trainer(tiny_model(), tmp_path)


def test_completion_that_tokenises_differently_is_named(tmp_path):
    tokenizer = tiny_tokenizer("what is tea be brief teais tea")
    plain, steered = "what is tea ", "be brief what is tea"
    bad = {"prompt": plain, "steered_prompt": steered, "completion": "is tea", "trait_score": 90}
    with pytest.raises(ValueError, match=r"train_dataset\[1\].*token boundary"):
        model = get_peft_model(tiny_model(), PSRConfig())
        good = {**bad, "steered_prompt": steered + " "}
        PSRTrainer(
            model,
            PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True),
            [good, bad],
            processing_class=tokenizer,
        )


def test_missing_score_and_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="no trait_score"):
        TripletCollator(tiny_tokenizer()).encode(triplets(trait_score=None)[0])
    assert TripletCollator(tiny_tokenizer(), alpha=1.0).encode(triplets(trait_score=None)[0])["alpha"] == 1.0
    for settings, message in [
        ({"objective": "mae"}, "mse, ll"),
        ({"objective": {"mse": -1.0}}, "must be >= 0"),
        ({"normalize_loss": "batch"}, "'global' or 'layer'"),
        ({"regularizer": -0.1}, "regularizer must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            PSRTrainingArguments(output_dir=str(tmp_path), **settings)
    with pytest.raises(TypeError, match="alpha must be a number"):
        PSRTrainingArguments(output_dir=str(tmp_path), alpha="strong")


def test_plain_arguments_are_refused_by_name(tmp_path):
    # their learning rate, batch size and epochs are others, and whether they were chosen can't be told
    with pytest.raises(TypeError, match="must be PSRTrainingArguments, got TrainingArg.*PSRTrainingArguments\\("):
        PSRTrainer(
            tiny_model(),
            TrainingArguments(str(tmp_path)),
            triplets(),
            processing_class=tiny_tokenizer(),
            peft_config=PSRConfig(),
        )
