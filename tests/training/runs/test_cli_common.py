"""What every command shares: output in any encoding, `~`, options from a file, and odd input in one line."""

from __future__ import annotations

import io
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import typer
from helpers.adapters import save_adapter
from helpers.commands import psr
from helpers.models import tiny_model
from helpers.paths import ROOT
from helpers.tokenizers import tiny_tokenizer
from rich.console import Console

import peft_psr
from peft_psr import cli
from peft_psr.cli.common import errors, home
from peft_psr.training.runs.drafting import draft_trait


WORDS = " ".join([*(f"w{i}" for i in range(55)), "🙂", "é"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer(WORDS).save_pretrained(folder / "base")
    save_adapter(folder / "formal", folder / "base", seed=1)
    return folder


@pytest.fixture
def piped(monkeypatch):
    """`psr` as a process whose streams have an encoding; returns (exit status, output)."""

    def run(encoding, *arguments, stdin=b""):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
        streams["stdin"] = io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding)
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["psr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        streams["stdout"].flush()
        return ended.value.code, streams["stdout"].buffer.getvalue()

    return run


# ---------------------------------------------------------------- output


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_show_and_gates_in_any_encoding(folder, piped, encoding):
    status, shown = piped(encoding, "show", f"f={folder / 'formal'}", "--text", "w1", "--answer", "w2 🙂 é w3")
    text = shown.decode(encoding)
    assert status == 0 and "w2[" in text and "\\U0001f642[" in text
    assert ("é[" if encoding != "ascii" else "\\xe9[") in text
    lines = b"w1 w2\n/gates\n\xe9\n/alpha 2\nw3\n"
    status, said = piped(
        encoding, "chat", f"f={folder / 'formal'}", "--temperature", "0", "--max-new-tokens", "4", stdin=lines
    )
    assert status == 0 and b"[9]" in said and "active: f (alpha 2)" in said.decode(encoding)
    assert (b"error: The line holds" in said) == (encoding == "ascii")  # which has no such byte


@pytest.mark.parametrize("name", ["embedded", "fast", "persona-embedded"])
def test_a_recipe_is_printed_as_the_bytes_that_ship(piped, name):
    status, printed = piped("cp1252", "recipes", name)
    found = next(path for room in ("training", "evaluation") for path in (ROOT / room).rglob(f"recipes/{name}.yaml"))
    assert status == 0 and printed == found.read_bytes()


def test_tables_and_help_in_ascii(piped):
    for arguments in (["recipes"], ["methods"], ["--help"], ["triplets", "--help"], ["recipes", "café"]):
        status, printed = piped("ascii", *arguments)
        assert status in (0, 2) and printed.decode("ascii")


def test_names_that_are_no_text_can_be_printed(piped, folder):
    status, said = piped("utf-8", "recipes", "\udce9")
    assert status == 2 and b"No recipe" in said
    status, said = piped("utf-8", "show", folder / "formal", "--text", "caf\udce9", "--answer", "w1")
    assert status == 2 and b"--prompt holds '\\udce9' at character 4" in said


# ---------------------------------------------------------------- places


def test_home():
    user = str(Path.home())
    assert home(Path("~/a b")) == Path(user, "a b") and home("~/x") == f"{user}/x" and home("n=~/x") == f"n={user}/x"
    assert home("~/runs/lr=1e-3/x") == f"{user}/runs/lr=1e-3/x" and home("n=~/lr=1") == f"n={user}/lr=1"
    assert home(["~/x", "me/x"]) == [f"{user}/x", "me/x"]
    assert home("~nobody-of-that-name/x") == "~nobody-of-that-name/x" and home(None) is None and home("") == ""


def test_home_in_every_command(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    recipe = ["--source", "embedded", "--model", "embedded", "--judge", "grammar", "--output=~/run", "--dry-run"]
    for arguments, expected in {
        ("show", "f=~/formal", "--text", "w1", "--model", "~/base", "--output=~/x.html", "--dry-run"):
            f"would show f ({folder}/formal) on {folder}/base",
        ("chat", "~/formal", "--dry-run"): f"would talk to {folder}/base with formal ({folder}/formal)",
        ("compose", "~/formal", "--weights", "1", "--output=~/both", "--dry-run"): f"would write {folder}/both",
        ("push", "~/none", "me/x", "--dry-run"): f"{folder}/none is no adapter folder",
        ("demo", "--output=~/demo", "--dry-run"): f"{folder}/demo/",
        ("draft", "x", "d", "--model", "m", "--output=~/traits", "--dry-run"): f"write to {folder}/traits/",
        ("triplets", *recipe): f"and write to {folder}/run/",
        ("train", "fast", "--model", "embedded", "--triplets", "~/none", "--output=~/o"): f"folder '{folder}/none'",
        ("evaluate", "persona", "persona-embedded", "--models", "~/none", "--output=~/o", "--dry-run"):
            f"there is no such folder. Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{folder}/no",
    }.items():  # fmt: skip
        done = psr(*arguments)
        assert expected in done.output.replace("\n", " "), done.output


# ---------------------------------------------------------------- options from a file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text: w1\ntext: w2\n", "line 2: the key 'text' stands in line 1 too"),
        (b"max-new-tokens: 1\nmax_new_tokens: 2\n", "gives max_new_tokens twice"),
        (b"prompt: \xe9\n", "line 1 is not UTF-8"),
        (b"\tprompt: x\n", "is not YAML: line 1"),
        (b"- prompt\n", "must hold options such as 'seed: 1', got list"),
        (b"3\n", "must hold options such as 'seed: 1', got int"),
    ],
)
def test_options_files_are_refused_in_words(folder, tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    done = psr("show", folder / "formal", "--config", tmp_path / "x.yaml")
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", "").split())


def test_an_options_file_gives_objects_as_yaml_has_them(folder, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("template_args: {enable_thinking: false, budget: null}\ndry_run: true\nprompt: w1\n")
    done = psr("show", folder / "formal", "--config", options)
    assert done.exit_code == 0, done.output
    options.write_text("template_args: {messages: 1}\ndry_run: true\nprompt: w1\n")
    refused = psr("show", folder / "formal", "--config", options)
    assert refused.exit_code == 2 and "'messages' can't be an argument of a chat template" in refused.output


def test_options_file_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "x.yaml").write_text("adapters: [~/formal]\nprompt: w1\nmodel: ~/base\ndry-run: true\n")
    assert f"would show formal ({folder}/formal) on {folder}/base" in psr("show", "--config", "~/x.yaml").output


# ---------------------------------------------------------------- odd input


def test_an_error_is_one_line_whatever_it_holds(capsys):
    with pytest.raises(typer.Exit), errors(Console()):
        raise ValueError("[/x] " + "long " * 40)
    assert capsys.readouterr().out.count("\n") == 1
    done = psr("demo", "--trait", "[/x]")
    assert done.exit_code == 2 and "error: No trait '[/x]'" in done.output
    nested = ["--source", "embedded", "--model", "m", "--judge", "grammar", "--judge-fields", "[" * 30000]
    assert "error: " in psr("triplets", *nested, "--output", "x").output


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", b"", "is no adapter's configuration"),
        ("adapter_config.json", b"[]", "is no adapter's configuration"),
        ("adapter_config.json", b"{}", "an adapter of type None, not 'PSR'"),
        ("adapter_config.json", b'{"peft_type": null}', "is no adapter's configuration"),
        ("adapter_config.json", b'{"peft_type": "FOO"}', "is no adapter's configuration: 'FOO'"),
        ("adapter_config.json", b"\xff\xfe{}", "is no adapter's configuration"),
        ("adapter_model.safetensors", b"", "can't be read"),
    ],
)
def test_adapters_that_are_none(folder, tmp_path, file, content, message):
    save_adapter(tmp_path / "bad", folder / "base", seed=1)
    (tmp_path / "bad" / file).write_bytes(content)
    for arguments in (
        ("show", tmp_path / "bad", "--text", "w1", "--answer", "w2"),
        ("compose", tmp_path / "bad", "--weights", "1", "--output", tmp_path / "c"),
    ):
        done = psr(*arguments)
        assert done.exit_code == 2 and done.output.startswith("error: ") and message in done.output
    assert psr("push", tmp_path / "bad", "me/x", "--base-model", "me/b", "--dry-run").exit_code == 2


def test_a_draft_is_not_asked_for_where_it_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; name a folder"):
        draft_trait("grim", "Grim.", lambda messages: pytest.fail("asked"), tmp_path / "file")


# ---------------------------------------------------------------- a clone that is not installed


def test_a_clone_works_without_being_installed():
    for name in ("training", "evaluation", "serving"):
        found = PathFinder.find_spec(f"peft_psr.{name}", peft_psr.__path__)
        assert found is not None and Path(found.origin) == ROOT / name / "__init__.py"
