"""Base models by name: of the revision that was asked for, and nothing but a model."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import tiny_model
from helpers.tokenizers import CHATML, byte_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from peft_psr import PSRConfig, tiny_chat_path
from peft_psr.base_model.loading import ModelName, load_model, load_tokenizer, tokenizer_of
from peft_psr.cli import _cut_settings, app
from peft_psr.evaluation.benchmarks.given import check_adapter
from peft_psr.evaluation.benchmarks.persona.recipe import PersonaRecipe
from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
from peft_psr.hub.facts import AdapterFacts
from peft_psr.hub.model_card import write_model_card
from peft_psr.hub.steered_model import base_model_of, load_with_adapters, template_args_for
from peft_psr.training import LocalSampler, write_triplets


def small(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=2, eos_token_id=1, bos_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save(folder, model=None, template=CHATML):
    (small() if model is None else model).save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model in the Hub's cache with two revisions that differ in weights and template."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--me--base"
    (repo / "refs").mkdir(parents=True)
    for ref, sha, seed in (("main", "a" * 40, 0), ("v1", "b" * 40, 1)):
        (repo / "refs" / ref).write_text(sha)
        save(repo / "snapshots" / sha, small(seed), CHATML.replace("m['role']", f"m['role'] + ' {ref}'"))
    return tmp_path


def adapter(folder, base="me/base", revision=None):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, revision=revision), PSRConfig(revision=revision))
    model.save_pretrained(folder)
    return str(folder)


def weight(model):
    return model.get_input_embeddings().weight


def test_every_door_loads_the_adapters_revision(hub):
    where = adapter(hub / "formal", revision="v1")
    expected = weight(AutoModelForCausalLM.from_pretrained("me/base", revision="v1"))
    assert not torch.equal(expected, weight(load_model("me/base")))
    assert base_model_of({"f": where}) == ("me/base", "v1")
    assert base_model_of({"f": where}, "me/base") == ("me/base", "v1")
    assert base_model_of({"f": where}, "me/base", "main") == ("me/base", "main")
    assert base_model_of({"f": where}, "other") == ("other", None)
    model, tokenizer = load_with_adapters(base_model_of({"f": where}), {"f": where})
    assert torch.equal(weight(model), expected) and " v1" in tokenizer.chat_template
    assert " v1" in tokenizer_of(model).chat_template
    assert load_model("me/base").config._commit_hash == "a" * 40
    assert load_model("me/base", "v1").config._commit_hash == model.config._commit_hash == "b" * 40
    assert LocalSampler(load_model("me/base", "v1"), tokenizer, 1).describe()["revision"] == "b" * 40
    assert torch.equal(weight(AutoPeftModelForCausalLM.from_pretrained(where)), expected)
    user = [{"role": "user", "content": "what is tea"}]
    rows = [
        {"prompt": user, "steered_prompt": [{"role": "system", "content": "be formal"}, *user], "completion": "ok"}
    ]
    write_triplets(rows, hub / "rows.jsonl")
    settings = _cut_settings(model.peft_config["f"], 1, hub / "rows.jsonl")
    assert torch.equal(weight(settings["model"]), expected)
    write_model_card(where, AdapterFacts(template_args={"enable_thinking": False}))
    card = (hub / "formal" / "README.md").read_text(encoding="utf-8")
    assert "revision=base.revision" in card and "set_chat_template(tokenizer, template_args={'enable_thinking'" in card


def test_two_revisions_are_two_models(hub):
    both = {"new": adapter(hub / "new"), "old": adapter(hub / "old", revision="v1")}
    with pytest.raises(ValueError, match="different models: new for me/base; old for me/base at revision v1"):
        base_model_of(both)
    assert base_model_of(both, "me/base", "v1") == ModelName("me/base", "v1")
    asked = ["evaluate", "persona", "persona-embedded", "--models", "me/base", "--methods", "none"]
    asked += ["--output", str(hub / "out"), "--dry-run", "--adapters", json.dumps({"f": both["old"]})]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 2 and "'f' is of me/base at revision v1" in said.output
    said = CliRunner().invoke(app, [*asked, "--revision", "v1"])
    assert "at revision v1" not in said.output


@pytest.mark.parametrize("kind", ["LORA", "PSR"])
def test_an_adapters_repository_is_no_model(tmp_path, kind):
    base = save(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM") if kind == "LORA" else PSRConfig()
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    name = str(tmp_path / "adapter")
    way_out = "Merge the two first" if kind == "LORA" else f"name {base} as the model"
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"is a {kind} adapter of {base}, not a model.*{way_out}"):
            load(name)
    steered = str(tmp_path / "psr")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), PSRConfig()).save_pretrained(steered)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "steered_prompt": "b", "completion": "c", "trait_score": 90}) + "\n")
    out = ["--output", str(tmp_path / "out")]
    for command in (
        ["train", "fast", "--model", name, "--triplets", str(rows), "--eval-share", "0", *out],
        ["chat", f"f={steered}", "--model", name],
        ["show", f"f={steered}", "--text", "hi", "--model", name],
        ["triplets", "personas-local", "--model", name, "--judge-model", base, "--dry-run", *out],
        ["evaluate", "persona", "persona-embedded", "--models", name, *out],
    ):
        said = CliRunner().invoke(app, command)
        assert said.exit_code == 2 and f"is a {kind} adapter of" in " ".join(said.output.split()), said.output


def test_ones_own_folder_and_template(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "base", template=None)
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    tokenizer = load_tokenizer("~/base", chat_template="~/own.jinja")
    assert tokenizer.chat_template == CHATML and load_model("~/base").config.hidden_size == 32
    assert load_tokenizer("~/base").chat_template is None


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_if_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    save(tmp_path / "base", tiny_model())
    (tmp_path / "base" / "own.py").write_text(CODE)
    path = tmp_path / "base" / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": own}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(tmp_path / "base"))
    assert type(load_model(str(tmp_path / "base"), trust_remote_code=True)).__name__ == "OwnLM"


def test_template_arguments_of_the_adapters(tmp_path):
    base, facts = save(tmp_path / "base"), AdapterFacts(template_args={"enable_thinking": False})
    quiet = adapter(tmp_path / "quiet", base)
    facts.save(quiet)
    assert template_args_for({"a": quiet}, None) == {"enable_thinking": False}
    assert template_args_for({"a": quiet}, {}) == {}
    plain = adapter(tmp_path / "plain", base)
    assert template_args_for({"a": quiet, "b": plain}, None) == {"enable_thinking": False}
    AdapterFacts(trait="formal").save(plain)
    with pytest.raises(ValueError, match="a with .*enable_thinking.*--template-args"):
        template_args_for({"a": quiet, "b": plain}, None)


def test_an_adapters_configuration_that_can_not_be_read(tmp_path):
    base = save(tmp_path / "base")
    for content in ("{", "[]", '{"peft_type": null}'):
        (tmp_path / "base" / "adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match="can't be read|is a None adapter"):
            load_model(base)
        asked = ["evaluate", "persona", "persona-embedded", "--methods", "none", "--output", str(tmp_path / "out")]
        said = CliRunner().invoke(app, [*asked, "--adapters", json.dumps({"f": base}), "--dry-run"])
        assert said.exit_code == 2 and "'f' is not to be had from" in " ".join(said.output.split()), said.output


def test_an_adapter_measured_with_other_template_arguments_is_warned_of(tmp_path, caplog):
    where = adapter(tmp_path / "formal", base=tiny_chat_path())
    given = {"source": "embedded", "models": "embedded", "judge": "grammar", "adapters": {"mine": where}}

    def said(**more):
        caplog.clear()
        check_adapter("mine", where, load_evaluate_recipe(PersonaRecipe, None, given | more))
        return caplog.text

    assert not said(template_args={"enable_thinking": False})  # it does not say what it was trained with
    AdapterFacts(template_args={"enable_thinking": False}).save(where)
    assert 'Adapter mine was trained with other arguments of the chat template ({"enable_thinking": false})' in said()
    assert not said(template_args={"enable_thinking": False})
