"""Fixtures that tests of several files use."""

from __future__ import annotations

import gc
from functools import partial

import pytest
from helpers.adapters import FACTS, named_model, save_adapter
from helpers.commands import CHAT_WORDS, open_session
from helpers.hub import LoopbackHub
from helpers.models import tiny_model
from helpers.runs import make_files, make_recipe
from helpers.tokenizers import tiny_tokenizer
from huggingface_hub import constants, hf_api


LONG = """
axbench_benchmark baselines_lora baselines_trained benchmarks cli_train command compile context_triplets
distributed evaluate evaluation faithfulness_benchmark frozen hooks ifeval_benchmark ifeval_judge import_order
initialization layouts live_lora own_judge own_objective own_source partial peft_checks prompt_ends recipe
registries run run_another sharing side_effects_benchmark template_file tiny_chat train_compiled train_resume
train_robust train_run train_several trainer
""".split()
"""Files that train, start processes or try every layout: not in the fast half, `-m "not slow and not long"`."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in LONG:
            item.add_marker("long")


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """The Trainer collects garbage at each start; what the imports have made need not be looked through each time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def offline():
    """No look-ups on the Hub, which take a minute each where there is no network; `hub` has one on loopback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process's client talks to, without a token and with a cache of its own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter with facts and card."""
    folder = tmp_path / "formal"
    named_model(alpha=1.25, layers_to_transform=[0, 2]).save_pretrained(folder)
    FACTS.save(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with what `psr train` takes."""
    return make_files(tmp_path_factory.mktemp("made"))


@pytest.fixture
def recipe(made):
    """Makes recipes of `psr train` on `made`."""
    return partial(make_recipe, made)


@pytest.fixture
def no_key(monkeypatch):
    """No server's key in the environment."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A base model, two adapters that edit the same tokens, and one that edits all."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer(CHAT_WORDS).save_pretrained(folder / "base")
    save_adapter(folder / "formal", folder / "base", seed=1)
    save_adapter(folder / "brief", folder / "base", seed=2, layers_to_transform=[0, 2, 3], r=2, alpha=0.5)
    save_adapter(folder / "loud", folder / "base", seed=3, positions="all")
    return folder


@pytest.fixture
def session(chat_folder):
    """A greedy chat with all adapters of `chat_folder`."""
    return open_session(chat_folder)
