"""`psr chat`: what it loads, the lines of its terminal, the command."""

from __future__ import annotations

import io
import json
import sys

import pytest
from helpers.adapters import save_adapter
from helpers.commands import CHAT_WORDS, open_session, psr, talk
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import LoraConfig, get_peft_model
from rich.console import Console

from peft_psr import tiny_chat_path
from peft_psr.hub.steered_model import base_model_of
from peft_psr.serving.chat import load_chat_model, name_adapters, read_lines


def test_names_of_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_adapters(["runs/formal/", "b=some-user/some.repo"]) == {
        "formal": "runs/formal/",
        "b": "some-user/some.repo",
    }
    for bad in ("some-user/some.repo", "none=x", "a+b=x", "psr=x", "=x"):
        with pytest.raises(ValueError, match="can't be the name of an adapter.*trait="):
            name_adapters([bad])
    with pytest.raises(ValueError, match="Two adapters are named 'a'.*a2=y/a"):
        name_adapters(["x/a", "y/a"])
    with pytest.raises(ValueError, match="at least one adapter"):
        name_adapters([])


def test_adapters_that_do_not_go_together(chat_folder, tmp_path):
    save_adapter(tmp_path / "other", "another/model", seed=1)
    adapters = {"formal": str(chat_folder / "formal"), "other": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=f"formal for {chat_folder / 'base'}; other for another/model.*--model"):
        base_model_of(adapters)
    assert base_model_of(adapters, "mine") == ("mine", None)
    save_adapter(tmp_path / "homeless", "", seed=1)
    with pytest.raises(ValueError, match="'x' does not say which model it is for; name it with --model"):
        base_model_of({"x": str(tmp_path / "homeless")})
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="adapter of type 'LORA', not 'PSR'"):
        base_model_of({"x": str(tmp_path / "lora")})


def test_models_that_will_not_do(chat_folder, tmp_path):
    with pytest.raises(ValueError, match="Adapter 'formal' .* does not fit the model"):
        load_chat_model(tiny_chat_path(), {"formal": str(chat_folder / "formal")})
    tiny_model().save_pretrained(tmp_path / "plain")
    tokenizer = tiny_tokenizer(CHAT_WORDS)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no chat template"):
        load_chat_model(str(tmp_path / "plain"), {"formal": str(chat_folder / "formal")})


@pytest.mark.parametrize(
    "line, message",
    [
        ("/use nope", "No adapter 'nope'; there are: formal, brief, loud, or none."),
        ("/use formal+nope", "No adapter 'nope'"),
        ("/use formal+formal", "names an adapter twice"),
        ("/use formal+loud", "edit different tokens of a conversation (formal 'response', loud 'all')"),
        ("/use", "/use needs adapters: formal+brief+loud"),
        ("/alpha", "/alpha needs a number: /alpha 1.5, or /alpha formal 1.5"),
        ("/alpha much", "/alpha needs a number"),
        ("/alpha formal brief 1", "/alpha needs a number"),
        ("/alpha nan", "alpha must be finite"),
        ("/alpha nope 1", "No adapter 'nope'"),
        ("/gates", "no answer to look at yet"),
        ("/shout", "No command '/shout'; there are: /traits, /use, /alpha, /gates, /system, /reset, /help, /quit."),
    ],
)
def test_mistakes_change_nothing(session, line, message):
    session.use(["formal", "brief"])
    printed = talk(session, line, "w1")
    assert f"error: {message}" in " ".join(printed.split()) or message in printed
    assert session.active == ["formal", "brief"]
    assert [session.config(name).alpha for name in session.names] == [1.0, 0.5, 1.0]
    assert [message["content"] for message in session.messages][0] == "w1"


def test_commands(session, tmp_path):
    path = tmp_path / "transcript.json"
    printed = talk(
        session, "w1", "", "/alpha 2", "/use formal + brief", "/system w9", "w2", "/gates", "/reset", "/use none",
        "w3", "/traits", "/help", "/quit", "w4", transcript=path,
    )  # fmt: skip
    written = json.loads(path.read_text())
    turns = written["turns"]
    assert [turn["user"] for turn in turns] == ["w1", "w2", "w3"]  # nothing after /quit
    assert [turn["alphas"] for turn in turns] == [{"formal": 1.0}, {"formal": 2.0, "brief": 0.5}, {}]
    assert [turn["system"] for turn in turns] == ["", "w9", "w9"]
    assert [message["content"] for message in session.messages] == ["w3", turns[2]["assistant"].strip()]
    for label, turn in zip(["formal", "formal+brief", "base model"], turns, strict=True):
        assert f"{label}: {turn['assistant']}" in printed
    assert "active: formal (alpha 2) + brief (alpha 0.5)" in printed and "active: none" in printed
    rows = [line.split() for line in printed.splitlines() if "response" in line or " all" in line]
    assert ["yes", "formal", "1", "0-3", "1", "relu", "response"] in rows  # at the start
    assert ["formal", "2", "0-3", "1", "relu", "response"] in rows  # at the end
    assert ["brief", "0.5", "0,", "2-3", "2", "relu", "response"] in rows
    assert all(command in printed for command in ("/traits", "/use formal+concise", "/alpha [NAME] 1.5", "/quit"))
    assert printed.count("⁹") >= 2


def test_interrupt_ends_the_command_not_the_session(session, monkeypatch):
    def interrupted(*signs):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "gates", interrupted)
    assert "formal: " in talk(session, "/gates", "w1")


def test_answers_are_printed_as_they_are(session, monkeypatch):
    monkeypatch.setattr(session.processing_class, "decode", lambda *args, **kwargs: "[bold]x[/] 12")
    assert "formal: [bold]x[/] 12\n" in talk(session, "w1")


def test_piped_lines_are_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n[b]two\n"))
    console = Console(file=io.StringIO())
    assert [line.strip() for line in read_lines(console)] == ["one", "[b]two"]
    assert console.file.getvalue() == "> one\n> [b]two\n"


def test_command_line(chat_folder, tmp_path):
    (tmp_path / "options.yaml").write_text(
        f"adapters: [{chat_folder / 'formal'}, b={chat_folder / 'brief'}]\ntemperature: 0\n"
    )
    arguments = ("--config", tmp_path / "options.yaml", "--max-new-tokens", 8, "--output", tmp_path / "talk.json")
    dry = psr("chat", *arguments, "--dry-run")
    assert dry.exit_code == 0 and f"would talk to {chat_folder / 'base'} with formal" in dry.stdout
    assert not (tmp_path / "talk.json").exists()
    done = psr("chat", *arguments, input="/use formal+b\nw1 w2\n/nonsense\n")
    session = open_session(chat_folder)
    session.use(["formal", "brief"])
    assert done.exit_code == 0, done.output
    assert f"> w1 w2\nformal+b: {session.ask('w1 w2').text}\n" in done.stdout and "error: No command" in done.stdout
    assert json.loads((tmp_path / "talk.json").read_text())["turns"][0]["alphas"] == {"formal": 1.0, "b": 0.5}
    again = psr("chat", *arguments)
    assert again.exit_code == 2 and "is there already" in " ".join(again.stdout.split())
