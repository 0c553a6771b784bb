"""Adapters combined as files: the same as combining them in a model, for unlike ranks, layers, gates and strengths."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapters import BASE, randomize, several
from helpers.commands import psr
from helpers.models import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_psr import PSRConfig, PSRWarning, tiny_chat_path
from peft_psr.base_model.loading import load_tokenizer
from peft_psr.cli import app
from peft_psr.hub.saved_adapters import compose_adapters
from peft_psr.tiny_chat import prompt_messages, questions
from peft_psr.training import AdapterFacts, Part, write_triplets


IDS = torch.tensor([[1, 9, 12, 17, 23, 31], [1, 40, 8, 22, 5, 6]])


@pytest.fixture
def saved(tmp_path):
    """Folders of adapters a, b and c."""
    several().save_pretrained(tmp_path)
    AdapterFacts(trait="formal").save(tmp_path / "a")
    return tmp_path


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("names", "weights"), [("ab", [1.0, -0.5]), ("abc", [0.3, 1.0, 2.0]), ("c", [1.5]), ("aa", [1.0, 2.0])]
)
def test_files_combine_as_adapters_in_a_model_do(tmp_path, layout, names, weights):
    model = several(layout)
    model.save_pretrained(tmp_path)
    compose_adapters([tmp_path / name for name in names], weights, tmp_path / "both")
    unique = {name: sum(w for n, w in zip(names, weights, strict=True) if n == name) for name in names}
    model.add_weighted_adapter(list(unique), list(unique.values()), "both", combination_type="cat")
    model.set_adapter("both")
    loaded = PeftModel.from_pretrained(tiny_model(layout), tmp_path / "both").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    if len(unique) == len(names):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.allclose(loaded(IDS).logits, tiny_model(layout)(IDS).logits, atol=1e-2)


def test_named_modules(tmp_path):
    configs = {"a": {"target_modules": ["layers.0.mlp.down_proj", "lm_head"]}, "b": {"layers_to_transform": 2, "r": 2}}
    model = several(adapters=configs)
    model.save_pretrained(tmp_path)
    compose_adapters([tmp_path / "a", tmp_path / "b"], [1.0, 0.5], tmp_path / "both")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "both").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_result_is_an_ordinary_adapter_that_names_its_parts(saved):
    config = compose_adapters([saved / "a", saved / "b"], [1.0, -0.5], saved / "out" / "both")
    folder = saved / "out" / "both"
    assert [path.name for path in folder.parent.iterdir()] == ["both"]
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == BASE and written["alpha"] == 1.0 and written["inference_mode"]
    assert written["layers_to_transform"] == [0, 1, 3] == config.layers_to_transform and written["r"] == 4
    assert AdapterFacts.load(folder).parts == (Part("a", 1.0, "formal"), Part("b", -0.5))
    card = (folder / "README.md").read_text()
    assert "| a | formal | 1 |" in card and "| b | not recorded | -0.5 |" in card and str(saved) not in card


def test_mistakes_leave_nothing_behind(saved, tmp_path):
    for name, settings, base in [
        ("other", {}, "me/other"),
        ("everywhere", {"positions": "all"}, BASE),
        ("saves_more", {"modules_to_save": ["lm_head"]}, BASE),
    ]:
        several(adapters={name: settings}, base=base).save_pretrained(saved)
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(saved / "lora")
    several(adapters={"broken": {}}).save_pretrained(saved)
    config = json.loads((saved / "broken" / "adapter_config.json").read_text())
    (saved / "broken" / "adapter_config.json").write_text(json.dumps({**config, "gate": "constant"}))
    several(adapters={"resized": {}}).save_pretrained(saved, save_embedding_layers=True)
    before = sorted(saved.rglob("*"))
    for names, weights, message in [
        (["a", "other"], [1, 1], "different base models .*a: me/base.*other: me/other.*--base-model"),
        (["a", "everywhere"], [1, 1], "different positions"),
        (["a", "saves_more"], [1, 1], "modules_to_save"),
        (["a", "resized"], [1, 1], r"resized holds more than edits: lm_head\.weight, model\.embed_tokens\.weight"),
        (["a", "lora"], [1, 1], "'LORA'|LORA"),
        (["a", "broken"], [1, 1], "weights of .*broken can't be read or do not fit"),
        (["a", "b"], [1], "2 adapters and 1 weights"),
        ([], [], "0 adapters"),
        (["a", "b"], [1, float("inf")], "weight must be finite"),
        (["a", "no such thing"], [1, 1], "No adapter folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            compose_adapters([saved / name for name in names], weights, saved / "both")
    with pytest.raises(FileExistsError, match="is not empty; name another folder"):
        compose_adapters([saved / "b"], [1], saved / "a")
    assert sorted(saved.rglob("*")) == before


def test_same_folder_names_and_one_model_under_two_names(tmp_path):
    several(base="me/base").save_pretrained(tmp_path / "x")
    several(base="/models/base").save_pretrained(tmp_path / "y")
    with pytest.raises(ValueError, match="different base models"):
        compose_adapters([tmp_path / "x" / "a", tmp_path / "y" / "a"], [1, 1], tmp_path / "both")
    config = compose_adapters(
        [tmp_path / "x" / "a", tmp_path / "y" / "a"], [1, 1], tmp_path / "both", base_model="me/base"
    )
    assert config.base_model_name_or_path == "me/base" and config.r == 2


def test_the_revision_that_the_adapters_name(tmp_path):
    for name, settings, base in [
        ("a", {"revision": None}, BASE),
        ("main", {"revision": "main"}, BASE),
        ("v2", {"revision": "v2"}, BASE),
        ("copy", {}, "/models/base"),
    ]:
        several(adapters={name: settings}, base=base).save_pretrained(tmp_path)

    def revision(*names, **settings):
        folders = [tmp_path / name for name in names]
        return compose_adapters(folders, [1.0] * len(names), tmp_path / "both", dry_run=True, **settings).revision

    assert revision("a", "main") in (None, "main")
    assert (
        revision("v2", "v2")
        == revision("v2", "v2", base_model=BASE)
        == revision("v2", "copy", base_model=BASE)
        == "v2"
    )
    assert revision("v2", "copy", base_model="/models/base") is None
    with pytest.raises(ValueError, match="a: me/base, revision main; v2: me/base, revision v2"):
        revision("a", "v2")


def test_the_arguments_of_the_chat_template_that_the_parts_were_trained_with(saved):
    args = {"enable_thinking": False}
    for name, trained in (("a", args), ("b", args)):
        AdapterFacts(trait=name, template_args=trained).save(saved / name)
    compose_adapters([saved / name for name in "abc"], [1.0] * 3, saved / "all")  # of c nothing is known
    assert AdapterFacts.load(saved / "all").template_args == args
    AdapterFacts(trait="b").save(saved / "b")
    with pytest.warns(PSRWarning, match="different arguments of the chat template"):
        compose_adapters([saved / "a", saved / "b"], [1.0, 1.0], saved / "both")
    assert AdapterFacts.load(saved / "both").template_args == {}


def test_failure_while_writing(saved, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("peft_psr.hub.saved_adapters.write_model_card", full)
    before = sorted(saved.iterdir())
    with pytest.raises(OSError, match="No space"):
        compose_adapters([saved / "a"], [1], saved / "both")
    assert sorted(saved.iterdir()) == before


def test_command_line(saved):
    dry = psr("compose", saved / "a", saved / "b", "--weights", "-1.0,0.5", "--output", saved / "both", "--dry-run")
    assert dry.exit_code == 0 and "would write" in dry.output and not (saved / "both").exists()
    options = saved / "compose.yaml"
    options.write_text(f"adapters: [{saved / 'a'}, {saved / 'b'}]\nweights: [-1.0, 0.5]\noutput: {saved / 'both'}\n")
    done = psr("compose", "--config", options)
    assert done.exit_code == 0 and "rank 4, layers [0, 1, 3]" in done.output
    assert [part.weight for part in AdapterFacts.load(saved / "both").parts] == [-1.0, 0.5]
    again = psr("compose", "--config", options)
    assert again.exit_code == 2 and "error:" in again.output and "is not empty" in again.output
    wrong = psr("compose", saved / "a", "--weights", "much", "--output", saved / "x")
    assert wrong.exit_code == 2 and "must be numbers" in wrong.output


def test_names_on_the_hub(saved, hub):
    for name in "ab":
        hub.add(f"me/{name}", {path.name: path.read_bytes() for path in (saved / name).iterdir()})
    compose_adapters(["me/a", "me/b"], [1.0, -0.5], saved / "from_hub")
    compose_adapters([saved / "a", saved / "b"], [1.0, -0.5], saved / "from_folders")
    file = "adapter_model.safetensors"
    assert (saved / "from_hub" / file).read_bytes() == (saved / "from_folders" / file).read_bytes()
    assert AdapterFacts.load(saved / "from_hub").parts == (Part("me/a", 1.0, "formal"), Part("me/b", -0.5))
    with pytest.raises(ValueError, match="me/none"):
        compose_adapters(["me/none"], [1.0], saved / "x")


def test_rank_cut_by_command(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_path()).eval()
    model = get_peft_model(base, PSRConfig(r=2), adapter_name="a")
    model.add_adapter("b", PSRConfig(gate="constant"))
    for seed, name in enumerate("ab"):
        randomize(model, f"psr_unit.{name}.", seed=seed)
    model.save_pretrained(tmp_path)
    texts = [question.text for question in questions("train")[:8]]
    write_triplets(
        [
            {"prompt": prompt_messages(text), "steered_prompt": prompt_messages(text), "completion": "it is good ."}
            for text in texts
        ],
        tmp_path / "answers.jsonl",
    )
    command = ["compose", str(tmp_path / "a"), str(tmp_path / "b"), "--weights", "1.0,-0.5", "--output"]
    cut = ["--rank", "1", "--triplets", str(tmp_path / "answers.jsonl")]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "cut"), *cut])
    assert result.exit_code == 0 and "rank 1" in result.output, result.output
    facts = AdapterFacts.load(tmp_path / "cut")
    assert list(facts.rank_cut) == list("012345") and 0 < min(facts.rank_cut.values()) < 1
    assert f"layer 0: {100 * facts.rank_cut['0']:.1f} %" in result.output
    assert f"0: {facts.rank_cut['0']:.2f}, 1:" in (tmp_path / "cut" / "README.md").read_text()
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_chat_path()), tmp_path / "cut")
    assert reloaded.active_peft_config.r == 1

    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(
            'no JSON\n{"prompt": "Is tea", "steered_prompt": "Is tea", "completion": "' + "good " * 2000 + '"}\n'
        )
    result = CliRunner().invoke(app, [*command, str(tmp_path / "cut again"), *cut])
    assert result.exit_code == 0 and "answers: 2 triplets left out. " in result.output, result.output
    assert "line 9 is not JSON" in result.output and "line 10" in result.output

    alone = CliRunner().invoke(app, [*command, str(tmp_path / "x"), "--rank", "1"])
    assert alone.exit_code == 2 and "--rank and --triplets go together" in alone.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("said", ["by the triplets", "by the adapters"])
def test_a_rank_is_cut_on_prompts_as_they_were_drawn(tmp_path, monkeypatch, said):
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_path()).eval()
    randomize(get_peft_model(base, PSRConfig(r=2)), seed=0).save_pretrained(tmp_path / "a")
    args = {"enable_thinking": False}
    prompt = prompt_messages("is tea good")
    triplet = {"prompt": prompt, "steered_prompt": prompt, "completion": "it is good ."}
    if said == "by the adapters":
        AdapterFacts(trait="a", template_args=args).save(tmp_path / "a")
    rows = [{**triplet, "template_args": args} if said == "by the triplets" else triplet] * 4
    write_triplets(rows, tmp_path / "t.jsonl")
    given = []

    def load(*name, template_args=None):
        given.append(template_args)
        return load_tokenizer(*name, template_args=template_args)

    monkeypatch.setattr("peft_psr.base_model.loading.load_tokenizer", load)
    cut = ["--weights", "1", "--rank", 1, "--triplets", tmp_path / "t.jsonl", "--output"]
    result = psr("compose", tmp_path / "a", *cut, tmp_path / "cut")
    assert result.exit_code == 0 and given == [args], result.output
    if said == "by the triplets":
        write_triplets([*rows, {**triplet, "template_args": None}], tmp_path / "t.jsonl")
        result = psr("compose", tmp_path / "a", *cut, tmp_path / "x")
        assert result.exit_code == 2 and "drawn with different arguments of the chat template" in result.output
