"""`psr train` and its recipes: options, dry run, errors, and from `psr triplets` to an adapter without a network."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.commands import psr
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from typer.main import get_command

from peft_psr.cli import app
from peft_psr.positions import encode_chat
from peft_psr.tiny_chat import tiny_chat_path
from peft_psr.training import PSRTrainingArguments
from peft_psr.training.runs.train.assembly import make_arguments, make_config
from peft_psr.training.runs.train.recipe import TrainRecipe, load_train_recipe, shipped_train_recipes
from peft_psr.training.runs.triplets.recipe import shipped_recipes


NEEDED = {"model": "embedded", "triplets": "runs/toy"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """What `psr triplets` leaves, small."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    done = psr("triplets", "embedded", "--traits", "sycophantic,formal", "--instructions", 1, "--questions", 4,
               "--draws", 2, "--output", folder)  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


# ---------------------------------------------------------------- recipes


def test_every_field_of_a_recipe_is_an_option():
    options = {parameter.opts[0]: parameter for parameter in get_command(app).commands["train"].params}
    assert {f"--{name.replace('_', '-')}" for name in TrainRecipe.model_fields} <= set(options)
    assert options["--epochs"].help.endswith("(a number, above 0 | none)")
    assert psr("train", "--help").exit_code == 0


def test_the_reported_recipes_are_the_reported_settings(tmp_path):
    persona = load_train_recipe("reported-persona", NEEDED)
    ifeval = load_train_recipe("reported-ifeval", NEEDED)
    for recipe in (persona, ifeval):
        made = make_arguments(recipe, tmp_path)
        reported = PSRTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        for name in ("learning_rate", "weight_decay", "per_device_train_batch_size", "data_seed", "lr_scheduler_type",
                     "warmup_steps", "gradient_accumulation_steps"):  # fmt: skip
            assert getattr(made, name) == getattr(reported, name)
        assert made.learning_rate == 1e-3 and made.per_device_train_batch_size == 1 and made.data_seed == 123
        config = make_config(recipe)
        assert (config.r, config.layers_to_transform, config.init_weights) == (1, None, False)
    assert (persona.objective, persona.epochs, persona.positions) == ("mse", 15, "question_and_response")
    assert (persona.normalize_loss, persona.regularizer, persona.alpha) == ("global", 0.1, "trait_score")
    assert (ifeval.objective, ifeval.epochs, ifeval.positions) == ("ll", 7, "response")
    assert (ifeval.normalize_loss, ifeval.regularizer, ifeval.alpha) == (None, 0.0, 1.0)


def test_recipes_that_ship_are_listed_and_printed(tmp_path):
    listed = psr("recipes").output
    for name in shipped_train_recipes():
        assert name in listed and load_train_recipe(name, NEEDED).description
        (tmp_path / "my.yaml").write_text(psr("recipes", name).output)
        assert load_train_recipe(tmp_path / "my.yaml", NEEDED) == load_train_recipe(name, NEEDED)
    assert not set(shipped_train_recipes()) & set(shipped_recipes())


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("2", "layers_to_transform", 2),
        ("1, 3", "layers_to_transform", (1, 3)),
        ("[1, 3]", "layers_to_transform", (1, 3)),
        ("none", "layers_to_transform", None),
        ("kl", "objective", "kl"),
        ('{"mse": 1, "kl": 1e-3}', "objective", {"mse": 1.0, "kl": 1e-3}),
        ("{mse: 1, kl: 5}", "objective", {"mse": 1.0, "kl": 5.0}),
        ("0.5", "alpha", 0.5),
        ("trait_score", "alpha", "trait_score"),
        ("none", "teacher_cache", "none"),
        ("none", "normalize_loss", None),
        ("all", "traits", ()),
        ("a, b", "traits", ("a", "b")),
        ("['a', 'b']", "traits", ("a", "b")),
    ],
)
def test_fields_as_texts(text, name, value):
    assert getattr(load_train_recipe(None, {**NEEDED, name: text}), name) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3}, r"unknown field epoch \(value 3\). Did you mean epochs\? The fields are chat_template"),
        ({"objective": "mae"}, "objective: 'mae' is wrong; accepted: mse | ll | kl | a JSON object"),
        ({"objective": '{"mae": 1}'}, "objective: '{\"mae\": 1}' is wrong; accepted: mse"),
        ({"objective": {"mse": -1}}, "objective: {'mse': -1} is wrong"),
        ({"objective": {"mse": 0}}, "must not all be 0"),
        ({"layers_to_transform": "-1"}, "accepted: a whole number, at least 0 | a list of whole numbers | none"),
        ({"layers_to_transform": []}, "layers_to_transform: [] is wrong"),
        ({"eval_share": 1}, "accepted: a number, at least 0, below 1"),
        ({"report_to": "wandb"}, "accepted: none | tensorboard"),
        ({"early_stopping": 2}, "early_stopping needs a held-out loss: set eval_share"),
        ({"early_stopping": 2, "eval_share": 0.1, "parallel": True}, "all traits of a parallel run at once"),
        ({"model": None}, "model: None is wrong; accepted: text"),
        ({"epochs": 0}, "epochs: 0 is wrong; accepted: a number, above 0 | none"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError) as error:
        load_train_recipe(None, {**NEEDED, **fields})
    assert message.replace("\\", "") in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- the command


def test_from_triplets_to_an_adapter(toy, tmp_path):
    arguments = ["train", "fast", "--model", "embedded", "--triplets", toy, "--epochs", 2, "--output", tmp_path / "x"]
    done = psr(*arguments)
    assert done.exit_code == 0, done.output
    for title in ("trait", "seconds", "loss", "held out", "live gates", "at 0", "memory"):
        assert title in done.output
    assert f"sycophantic: {tmp_path / 'x' / 'sycophantic'}\n" in done.output
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "x" / "sycophantic").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_path())
    prompt = encode_chat(tokenizer, [[{"role": "user", "content": "What are dogs like?"}]])
    with torch.no_grad():
        steered = adapter(**prompt).logits
        with adapter.disable_adapter():
            assert not torch.allclose(steered, adapter(**prompt).logits, atol=1e-2)
    assert adapter.generate(**prompt, max_new_tokens=5).shape[1] > prompt["input_ids"].shape[1]
    used = yaml.safe_load((tmp_path / "x" / "formal" / "recipe.yaml").read_text())
    assert used["start"] == "ridge" and used["epochs"] == 2 and used["traits"] == ["formal"]
    written = (tmp_path / "x" / "formal" / "adapter_model.safetensors").stat().st_mtime_ns
    again = psr(*arguments)
    assert again.exit_code == 0 and again.output.splitlines()[-1] == done.output.splitlines()[-1]
    assert (tmp_path / "x" / "formal" / "adapter_model.safetensors").stat().st_mtime_ns == written
    other = psr(*arguments, "--r", 2)
    assert other.exit_code == 2 and "begun with another recipe (r: 1 -> 2)" in other.output


def test_parallel_and_config(toy, tmp_path):
    config = {"model": "embedded", "triplets": str(toy), "parallel": True, "objective": {"mse": 1.0}, "epochs": 5,
              "traits": ["sycophantic", "formal"], "eval-share": 0.0}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = psr("train", "fast", "--config", tmp_path / "config.yaml", "--epochs", 1, "--output", tmp_path / "x")
    assert done.exit_code == 0, done.output
    assert "trained together" in done.output and "held out" in done.output
    summaries = [json.loads((tmp_path / "x" / name / "summary.json").read_text()) for name in config["traits"]]
    assert summaries[0]["trained_with"] == ["formal"] and summaries[0]["steps"] == 1
    wrong = psr("train", "fast", "--config", tmp_path / "config.yaml", "--output", tmp_path / "x", "--epoch", 1)
    assert wrong.exit_code == 2 and "--epoch" in wrong.output


def test_a_dry_run_writes_nothing(toy, tmp_path):
    options = ["--model", "embedded", "--triplets", toy, "--dry-run", "--output", tmp_path / "x", "--epochs", "5"]
    done = psr("train", "fast", *options)
    assert done.exit_code == 0 and list(tmp_path.iterdir()) == []
    assert "would train 2 adapter(s) of embedded, r=1, start: ridge" in done.output
    assert "6 triplets, 2 held out; at most 5 steps" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "No recipe file 'nowhere.yaml', and none of that name ships; there are: fast, reported"),
        (["fast"], "triplets is missing"),
        (["fast", "--triplets", "nowhere"], "triplets: there is no file or folder 'nowhere'"),
        (["fast", "--triplets", "TOY", "--traits", "rude"], "has no 'rude'; there are: formal, sycophantic"),
        (["fast", "--triplets", "TOY", "--epochs", "many"], "epochs: 'many' is wrong"),
        (["fast", "--triplets", "TOY", "--eval-share", "0.99"], "would leave none to train on"),
        (["fast", "--triplets", "TOY", "--triplets-model", "x", "--model", "/nowhere"], "/nowhere"),
        (["fast", "--triplets", "TOY", "--model", tiny_chat_path()], "were drawn from 'embedded'"),
    ],
)
def test_errors_are_one_line_without_a_trace(toy, tmp_path, arguments, message):
    arguments = [toy if argument == "TOY" else argument for argument in arguments]
    model = [] if "--model" in arguments else ["--model", "embedded"]
    failed = psr("train", *arguments, *model, "--output", tmp_path / "x")
    assert failed.exit_code == 2 and message in failed.output and "Traceback" not in failed.output
    assert not (tmp_path / "x").exists()
