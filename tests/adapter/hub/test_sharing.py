"""Uploads with the real client against a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapters import BASE, FACTS, metadata, named_model, randomize, snippet
from helpers.commands import psr
from helpers.hub import TOKEN
from helpers.models import IDS, tiny_model
from helpers.tokenizers import tiny_tokenizer
from huggingface_hub import HfApi, constants
from peft import LoraConfig, PeftModel, get_peft_model

from peft_psr import PSRConfig
from peft_psr.hub.facts import FACTS_NAME
from peft_psr.hub.model_card import FIGURE_NAME
from peft_psr.hub.push import push_adapter
from peft_psr.training import AdapterFacts


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=TOKEN)


def test_push_uploads_the_adapter_and_nothing_else(adapter, hub, api):
    for name in ("optimizer.pt", "trainer_state.json", "checkpoint-1/adapter_model.safetensors"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("not to be shared")
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    done = push_adapter(adapter, "formal", private=True, api=api)
    there = hub.repositories["me/formal"]
    assert done.repo_id == "me/formal" and done.creates and done.commit == there.commits[-1] and there.private
    assert (
        set(there.files) - {".gitattributes"}
        == set(done.files)
        == {"adapter_config.json", "adapter_model.safetensors", "README.md", FACTS_NAME, FIGURE_NAME}
    )
    assert there.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    text = there.files["README.md"].decode()
    assert 'from_pretrained("me/formal")' in text and "**formal**" in text
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before


def test_own_card_is_uploaded_as_it_is(adapter, hub, api):
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    push_adapter(adapter, "me/formal", api=api)
    assert hub.repositories["me/formal"].files["README.md"] == b"---\nlicense: mit\n---\n\nMine.\n"


def test_dry_run_checks_and_changes_nothing(adapter, hub, api):
    planned = push_adapter(adapter, "me/formal", dry_run=True, api=api)
    assert planned.commit is None and hub.writes() == [] and hub.repositories == {}
    done = push_adapter(adapter, "me/formal", api=api)
    assert {**vars(done), "commit": None} == vars(planned)


def test_one_adapter_of_a_model(hub, api):
    model = named_model(name="formal", seed=1)
    model.add_adapter("pirate", PSRConfig(base_model_name_or_path=BASE, r=2, positions="all"))
    randomize(model, "psr_unit.pirate.", seed=2)
    with pytest.raises(ValueError, match="Name one PSR adapter .*: formal, pirate"):
        push_adapter(model, "me/pirate", api=api)
    with pytest.raises(ValueError, match="'grumpy'"):
        push_adapter(model, "me/pirate", adapter_name="grumpy", api=api)
    assert hub.requests == []
    push_adapter(model, "me/pirate", adapter_name="pirate", facts=AdapterFacts(trait="pirate"), api=api)
    files = hub.repositories["me/pirate"].files
    config = json.loads(files["adapter_config.json"])
    assert config["r"] == 2 and config["positions"] == "all"
    assert "**pirate**" in files["README.md"].decode()
    folder = Path(constants.HF_HUB_CACHE).parent / "fetched"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(files[name])
    model.set_adapter("pirate")
    fetched = PeftModel.from_pretrained(tiny_model(), folder).eval()
    assert torch.equal(fetched(IDS).logits, model.eval()(IDS).logits)


def test_existing_repository(adapter, hub, api):
    push_adapter(adapter, "me/formal", api=api)
    first = dict(hub.repositories["me/formal"].files)
    named_model(seed=7).save_pretrained(adapter)
    (adapter / FACTS_NAME).unlink()
    with pytest.raises(FileExistsError, match="me/formal holds an adapter already.*--update"):
        push_adapter(adapter, "me/formal", api=api)
    assert hub.repositories["me/formal"].files == first
    with pytest.raises(ValueError, match="is public"):
        push_adapter(adapter, "me/formal", update=True, private=True, api=api)
    done = push_adapter(adapter, "me/formal", update=True, api=api)
    second = hub.repositories["me/formal"].files
    assert second["adapter_model.safetensors"] != first["adapter_model.safetensors"]
    assert set(done.removes) == {FACTS_NAME, FIGURE_NAME} and not {FACTS_NAME, FIGURE_NAME} & set(second)


def test_somebody_else_commits_meanwhile(adapter, hub, api, monkeypatch):
    push_adapter(adapter, "me/formal", api=api)
    named_model(seed=7, layers_to_transform=[0, 2]).save_pretrained(adapter)
    FACTS.save(adapter)
    create_commit = api.create_commit

    def late(*args, **kwargs):
        hub.repositories["me/formal"].commit({"adapter_config.json": b"theirs"})
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(api, "create_commit", late)
    with pytest.raises(FileExistsError, match="meanwhile"):
        push_adapter(adapter, "me/formal", update=True, api=api)
    assert hub.repositories["me/formal"].files == {"adapter_config.json": b"theirs"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": b'{"peft_type": "PSR", "base_model_name_or_path": "them/other"}'}, "'them/other'"),
        ({"adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "me/base"}'}, "a LORA adapter"),
        ({"model.safetensors": b"", "config.json": b""}, "holds no adapter"),
    ],
)
def test_repository_that_holds_something_else(adapter, hub, api, files, message):
    hub.add("me/formal", files)
    with pytest.raises(ValueError, match=message):
        push_adapter(adapter, "me/formal", update=True, api=api)
    assert hub.writes() == [] and hub.repositories["me/formal"].files == files


def test_base_model_must_have_a_name(adapter, hub, api, tmp_path):
    path = str(tmp_path / "base")
    model = named_model(base=path)
    model.save_pretrained(adapter)
    FACTS.save(adapter)
    with pytest.raises(ValueError, match=f"{path}.*--base-model"):
        push_adapter(adapter, "me/formal", api=api)
    assert hub.requests == []
    push_adapter(adapter, "me/formal", base_model="them/base", api=api)
    files = hub.repositories["me/formal"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "them/base"
    assert metadata(files["README.md"].decode())["base_model"] == "them/base"
    for content in files.values():
        assert path.encode() not in content
    (adapter / "README.md").write_text(f"---\nlicense: mit\n---\nTrained on {path}.\n")
    with pytest.raises(ValueError, match="path of this machine"):
        push_adapter(adapter, "me/other", base_model="them/base", api=api)
    assert "me/other" not in hub.repositories


def test_mistakes_show_before_the_hub_is_asked(adapter, hub, api, tmp_path):
    with pytest.raises(ValueError, match="trained on 'me/base', not on 'me/other'"):
        push_adapter(adapter, "me/formal", base_model="me/other", api=api)
    with pytest.raises(FileNotFoundError, match="is no adapter folder"):
        push_adapter(tmp_path, "me/formal", api=api)
    with pytest.raises(ValueError, match="not a valid|Repo id"):
        push_adapter(adapter, "me/for mal", api=api)
    with pytest.raises(ValueError, match="is for a model"):
        push_adapter(adapter, "me/formal", adapter_name="formal", api=api)
    lora = tmp_path / "lora"
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(lora)
    with pytest.raises(ValueError, match="type 'LORA', not 'PSR'"):
        push_adapter(lora, "me/formal", api=api)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="can't be read"):
        push_adapter(adapter, "me/formal", api=api)
    weights.unlink()
    (adapter / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="a pickle"):
        push_adapter(adapter, "me/formal", api=api)
    assert hub.requests == []


def test_tokens(adapter, hub, api):
    with pytest.raises(PermissionError, match="hf auth login.*HF_TOKEN"):
        push_adapter(adapter, "me/formal", api=HfApi(endpoint=hub.url))
    with pytest.raises(PermissionError, match="401") as wrong:
        push_adapter(adapter, "me/formal", api=HfApi(endpoint=hub.url, token="hf_wrong"))
    assert "hf_wrong" not in str(wrong.value)
    with pytest.raises(PermissionError, match=r"does not let this token write to them/formal \(403\)"):
        push_adapter(adapter, "them/formal", api=api)
    assert hub.repositories == {}


def test_connection_cut_in_a_commit(adapter, hub, api):
    hub.cut = "before"
    with pytest.raises(ConnectionError, match="all or nothing.*run this again"):
        push_adapter(adapter, "me/formal", api=api)
    assert set(hub.repositories["me/formal"].files) == {".gitattributes"}
    hub.cut = None
    assert not push_adapter(adapter, "me/formal", api=api).creates
    assert "adapter_model.safetensors" in hub.repositories["me/formal"].files
    hub.cut = "after"
    with pytest.raises(ConnectionError, match="all or nothing"):
        push_adapter(adapter, "me/again", api=api)
    with pytest.raises(FileExistsError, match="--update"):
        push_adapter(adapter, "me/again", api=api)


def test_hub_that_is_not_there(adapter, hub):
    with pytest.raises(ConnectionError, match="Nothing was uploaded"):
        push_adapter(adapter, "me/formal", api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


def test_refused_metadata(adapter, hub, api):
    (adapter / "README.md").write_text("---\nlicense: [1, 2]\n---\nMine.\n")
    with pytest.raises(ValueError, match='"license" must be a string'):
        push_adapter(adapter, "me/formal", api=api)
    assert set(hub.repositories["me/formal"].files) == {".gitattributes"}


# ---------------------------------------------------------------- the command line


def test_command_line(adapter, hub, tmp_path, monkeypatch):
    missing = psr("push", adapter, "formal")
    assert missing.exit_code == 2 and "hf auth login" in missing.output
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    dry = psr("push", adapter, "formal", "--dry-run")
    assert dry.exit_code == 0 and f"would create {hub.url}/me/formal" in dry.output and hub.repositories == {}
    assert "would upload adapter_model.safetensors" in dry.output
    options = tmp_path / "push.yaml"
    options.write_text(f"folder: {adapter}\nrepo-id: me/formal\nprivate: true\n")
    done = psr("push", "--config", options)
    assert done.exit_code == 0 and "uploaded README.md" in done.output and hub.repositories["me/formal"].private
    assert hub.repositories["me/formal"].commits[-1] in done.output
    again = psr("push", adapter, "me/formal")
    assert again.exit_code == 2 and "--update" in again.output and "Traceback" not in again.output
    assert TOKEN not in missing.output + dry.output + done.output + again.output


@pytest.mark.long
def test_full_circle(adapter, hub, tmp_path):
    """Pushed by one process, loaded by another through the Hub, as the card says, bit for bit."""
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    hub.add(BASE, {path.name: path.read_bytes() for path in base.iterdir()})
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, text=True, capture_output=True
        )

    pushed = run("-m", "peft_psr.cli", "push", str(adapter), "formal")
    assert pushed.returncode == 0, pushed.stderr
    script = tmp_path / "as_the_card_says.py"
    script.write_text(
        snippet(hub.repositories["me/formal"].files["README.md"].decode())
        + "import torch\n"
        + "from peft_psr import PSRConfig\n"
        + "assert PSRConfig.from_pretrained('me/formal').alpha == 1.25\n"
        + f"torch.save(model(torch.tensor({IDS.tolist()})).logits, 'logits.pt')\n"
    )
    loaded = run(str(script))
    assert loaded.returncode == 0, loaded.stderr
    here = PeftModel.from_pretrained(tiny_model(), adapter).eval()
    assert torch.equal(torch.load(tmp_path / "logits.pt"), here(IDS).logits)
