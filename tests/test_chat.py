"""`psr chat`: what is typed steers what is generated, and the last answer can be looked at."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_adapter import save_adapter
from rich.console import Console
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peft_psr import cli, tiny_chat_path
from peft_psr.evaluation.chat import Chat, base_model_of, load_chat_model, name_adapters, read_lines
from peft_psr.evaluation.chat_session import ChatSession


WORDS = " ".join(f"w{i}" for i in range(57))  # one for each of the model's tokens, so that text can be encoded again
GREEDY = {"max_new_tokens": 8, "temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, two adapters that edit the same tokens, and one that edits all."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer(WORDS).save_pretrained(folder / "base")
    save_adapter(folder / "formal", folder / "base", seed=1)
    save_adapter(folder / "brief", folder / "base", seed=2, layers_to_transform=[0, 2, 3], r=2, alpha=0.5)
    save_adapter(folder / "loud", folder / "base", seed=3, positions="all")
    return folder


def open_session(folder, *names, **settings):
    adapters = name_adapters([str(folder / name) for name in names or ("formal", "brief", "loud")])
    return ChatSession(*load_chat_model(base_model_of(adapters), adapters), **{**GREEDY, **settings})


@pytest.fixture
def session(folder):
    return open_session(folder)


def by_hand(folder, prompt, names=(), alphas=None, mask=None, new=8):
    """The ids that PEFT's own way of using adapters gives."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    steering = {}
    if names:
        model = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folder / name, adapter_name=name)
        model.base_model.set_adapter(list(names))
        for name, alpha in (alphas or {}).items():
            model.set_alpha(alpha, adapter_name=name)
        model.eval()
        steering = {} if mask is None else {"steering_mask": torch.tensor([mask])}
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **steering
    )[0, len(prompt) :].tolist()
    return output[: output.index(2)] if 2 in output else output


def encode(session, text):
    return session.processing_class(text, add_special_tokens=False)["input_ids"]


FIRST = "<s> <user> w1 w2 </t> <assistant>"


# ---------------------------------------------------------------- steering


@pytest.mark.parametrize("names", [["formal"], ["brief"], ["formal", "brief"], []])
def test_use_is_what_peft_does(folder, session, names):
    session.use(names)
    pieces = []
    answer = session.ask("w1 w2", pieces.append)
    assert answer.ids[0].tolist() == by_hand(folder, encode(session, FIRST), names) and answer.ids.numel()
    assert "".join(pieces) == answer.text == session.processing_class.decode(answer.ids[0])
    assert list(answer.alphas) == names == session.active


def test_combinations_differ(folder, session):
    texts = set()
    for names in (["formal"], ["brief"], ["formal", "brief"], []):
        session.reset()
        session.use(names)
        texts.add(session.ask("w1 w2").text)
    assert len(texts) == 4


def test_alpha(folder, session):
    session.use(["formal", "brief"])
    session.set_alpha(0.0)
    assert session.ask("w1 w2").ids[0].tolist() == by_hand(folder, encode(session, FIRST))
    session.reset()
    session.set_alpha(-1.5, "brief")
    expected = by_hand(folder, encode(session, FIRST), ["formal", "brief"], {"formal": 0.0, "brief": -1.5})
    assert session.ask("w1 w2").ids[0].tolist() == expected
    session.use([])
    with pytest.raises(ValueError, match="No adapter is active. Name one: /alpha formal 2"):
        session.set_alpha(2.0)


def test_second_turn_edits_the_first_answer_again(folder, session):
    first = session.ask("w1 w2").ids[0].tolist()
    second = session.ask("w3").ids[0].tolist()
    prompt = encode(session, FIRST)
    rest = encode(session, "</t> <user> w3 </t> <assistant>")
    mask = [0] * (len(prompt) - 1) + [1] * (len(first) + 1) + [0] * (len(rest) - 1) + [1]
    ids = [*prompt, *first, *rest]
    assert session.last.prompt["input_ids"][0].tolist() == ids
    assert session.last.prompt["steering_mask"][0].tolist() == mask
    assert second == by_hand(folder, ids, ["formal"], mask=mask) != by_hand(folder, ids, ["formal"])
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_same_seed_same_answer(folder):
    sampled = {"temperature": 1.0, "max_new_tokens": 12}
    texts = [open_session(folder, seed=seed, **sampled).ask("w1").text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    session = open_session(folder, seed=3, **sampled)
    state = torch.get_rng_state()
    session.ask("w1")
    session.reset()
    assert session.ask("w1").text == texts[0] and torch.equal(torch.get_rng_state(), state)


def test_system_turn(folder, session):
    session.set_system("w9")
    expected = by_hand(folder, encode(session, "<s> <system> w9 </t> <user> w1 </t> <assistant>"), ["formal"])
    assert session.ask("w1").ids[0].tolist() == expected
    session.processing_class.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<user>"
    )
    with pytest.raises(ValueError, match="template refuses this: no system role"):
        session.set_system("w8")
    assert session.system == "w9"
    session.set_system("")
    assert session.system == ""


# ---------------------------------------------------------------- gates


def test_gates_are_those_of_the_answer(folder):
    session = open_session(folder, temperature=5.0)  # an answer of many words
    session.use(["formal", "brief"])
    with torch.no_grad():
        for layer in session.model.psr_layers().values():
            for unit in layer.psr_unit.values():
                unit.gate_bias.zero_()  # some gates close
    session.ask("w1 w2")
    answer = session.ask("w3")
    tokens = torch.cat([answer.prompt["input_ids"], answer.ids], dim=1)
    mask = torch.cat([answer.prompt["steering_mask"], torch.ones_like(answer.ids)], dim=1)
    start, n = answer.prompt["input_ids"].shape[1], answer.ids.shape[1]
    expected = {}
    for name in session.active:
        gates = session.model.gate_values(tokens, adapter_name=name, steering_mask=mask)
        total = [0.0] * n
        for values in gates.values():
            of_token = [values[0, start - 1 + i].sum().item() for i in range(n)]
            total = [before + value / max(*of_token, 1e-9) for before, value in zip(total, of_token, strict=True)]
        expected[name] = [value / max(total) for value in total]
    assert all(min(values) < 0.7 < max(values) for values in expected.values())

    # what is chosen now is not what the answer was made with
    session.use(["brief"])
    session.set_alpha(7.0, "formal")
    shaded = session.gates()
    assert list(shaded) == ["formal", "brief"]
    for name, text in shaded.items():
        assert text.plain == answer.text and len(text.spans) == n
        shades = [int(span.style.split(",")[1]) for span in text.spans]
        assert shades == pytest.approx([255 - 175 * value for value in expected[name]], abs=1.01)
    assert session.active == ["brief"] and session.config("formal").alpha == 7.0
    digits = session.gates(digits=True)["brief"].plain
    assert digits == "".join(
        f"{' ' if i else ''}{word}{'⁰¹²³⁴⁵⁶⁷⁸⁹'[round(9 * value)]}"
        for i, (word, value) in enumerate(zip(answer.text.split(), expected["brief"], strict=True))
    )


def test_gates_where_the_encoding_has_no_raised_digits(session):
    session.ask("w1 w2")
    raised, plain = (session.gates(digits=True, encoding=encoding)["formal"].plain for encoding in ("utf-8", "cp1252"))
    assert plain == "".join(f"[{'⁰¹²³⁴⁵⁶⁷⁸⁹'.index(c)}]" if c in "⁰¹²³⁴⁵⁶⁷⁸⁹" else c for c in raised)
    session.reset()
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Chat(session, Console(file=stream, width=100)).run(["w1 w2", "/gates", "w3"])
    stream.flush()
    assert f"formal: {plain}" in stream.buffer.getvalue().decode("ascii")


def test_names_in_two_unicode_forms_are_one(folder):
    assert list(name_adapters(["nowhere/cafe\u0301", "cafe\u0301s=x"])) == ["café", "cafés"]
    session = ChatSession(*load_chat_model(str(folder / "base"), {"café": str(folder / "formal")}), **GREEDY)
    said = talk(session, "/use none", "/use cafe\u0301", "/alpha cafe\u0301 2")
    assert "error" not in said and session.active == ["café"] and session.config("café").alpha == 2.0


def test_a_line_that_is_no_text_does_not_end_the_conversation(session):
    said = talk(session, "caf\udce9 w1", "w1 w2", "/system \udce9")
    assert said.count("error: The line holds '\\udce9' at character 4") == 1 and "The text holds" in said
    assert len(session.messages) == 2 and not session.system


def test_gates_without_an_answer(session):
    with pytest.raises(ValueError, match="no answer to look at yet"):
        session.gates()
    session.use([])
    session.ask("w1")
    with pytest.raises(ValueError, match="base model's: no gates"):
        session.gates()


# ---------------------------------------------------------------- limits


def test_interrupted_answer_is_kept_as_far_as_it_got(folder, session):
    whole = session.ask("w1 w2").ids[0].tolist()
    session.reset()
    pieces = []

    def stop_at_third(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = session.ask("w1 w2", stop_at_third)
    kept = answer.ids[0].tolist()
    assert answer.cut == "interrupted" and 2 <= len(kept) < len(whole) and kept == whole[: len(kept)]
    assert session.messages[-1]["content"] == answer.text == session.processing_class.decode(kept)
    session.reset()
    assert session.ask("w1 w2").ids[0].tolist() == whole


def test_full_context(folder):
    session = open_session(folder, max_new_tokens=100)  # of 128
    answer = session.ask(" ".join(["w1"] * 119))
    assert answer.cut == "context" and answer.prompt["input_ids"].shape[1] + answer.ids.shape[1] == 128
    before = list(session.messages)
    with pytest.raises(ValueError, match="has 13. tokens, and the model takes 128: /reset"):
        session.ask("w1")
    assert session.messages == before
    session.reset()
    assert session.ask("w1").ids.numel()


def test_answer_without_its_reasoning_becomes_the_turn(folder, monkeypatch):
    session = open_session(folder)
    session.processing_class = tiny_tokenizer(WORDS.replace("w50", "</think>"))
    template = session.processing_class.chat_template
    session.processing_class.chat_template = template.replace(
        "m['content']", "m['content'].split('</think>')[-1]|trim"
    )

    def generate(streamer, **settings):
        streamer.put(settings["input_ids"])
        for token in encode(session, "w1 </think> w2 w3 </t>"):
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(session.model, "generate", generate, raising=False)
    assert session.ask("w5").text == "w1 </think> w2 w3"
    second = session.ask("w6").prompt
    edited = second["input_ids"][second["steering_mask"].bool()]
    assert session.processing_class.decode(edited) == "<assistant> w2 w3 <assistant>"


def test_template_that_rewrites_earlier_turns(session):
    session.ask("w1")
    session.processing_class.chat_template = session.processing_class.chat_template.replace(
        "m['content']", "(m['content']|reverse if m['role'] == 'assistant' else m['content'])"
    )
    before = list(session.messages)
    with pytest.raises(ValueError, match="can't be told.*/reset"):
        session.ask("w2")
    assert session.messages == before


@pytest.mark.parametrize("settings, message", [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"temperature": -1.0}, "temperature must not be negative, got -1"),
])  # fmt: skip
def test_settings_out_of_range(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        open_session(folder, **settings)


# ---------------------------------------------------------------- loading


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


def test_adapters_that_do_not_go_together(folder, tmp_path):
    save_adapter(tmp_path / "other", "another/model", seed=1)
    adapters = {"formal": str(folder / "formal"), "other": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=f"formal for {folder / 'base'}; other for another/model.*--model"):
        base_model_of(adapters)
    assert base_model_of(adapters, "mine") == ("mine", None)
    save_adapter(tmp_path / "homeless", "", seed=1)
    with pytest.raises(ValueError, match="'x' does not say which model it is for; name it with --model"):
        base_model_of({"x": str(tmp_path / "homeless")})
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="adapter of type 'LORA', not 'PSR'"):
        base_model_of({"x": str(tmp_path / "lora")})


def test_models_that_will_not_do(folder, tmp_path):
    with pytest.raises(ValueError, match="Adapter 'formal' .* does not fit the model"):
        load_chat_model(tiny_chat_path(), {"formal": str(folder / "formal")})
    tiny_model().save_pretrained(tmp_path / "plain")
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no chat template"):
        load_chat_model(str(tmp_path / "plain"), {"formal": str(folder / "formal")})


# ---------------------------------------------------------------- the terminal


def talk(session, *lines, transcript=None):
    """What is printed, without colours."""
    console = Console(file=io.StringIO(), width=100)
    Chat(session, console, transcript).run(lines)
    return console.file.getvalue()


@pytest.mark.parametrize("line, message", [
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
])  # fmt: skip
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


# ---------------------------------------------------------------- the command


def psr_chat(*arguments, lines=""):
    return CliRunner().invoke(cli.app, ["chat", *map(str, arguments)], input=lines)


def test_command_line(folder, tmp_path):
    (tmp_path / "options.yaml").write_text(f"adapters: [{folder / 'formal'}, b={folder / 'brief'}]\ntemperature: 0\n")
    arguments = ("--config", tmp_path / "options.yaml", "--max-new-tokens", 8, "--output", tmp_path / "talk.json")
    dry = psr_chat(*arguments, "--dry-run")
    assert dry.exit_code == 0 and f"would talk to {folder / 'base'} with formal" in dry.stdout
    assert not (tmp_path / "talk.json").exists()
    done = psr_chat(*arguments, lines="/use formal+b\nw1 w2\n/nonsense\n")
    session = open_session(folder)
    session.use(["formal", "brief"])
    assert done.exit_code == 0, done.output
    assert f"> w1 w2\nformal+b: {session.ask('w1 w2').text}\n" in done.stdout and "error: No command" in done.stdout
    assert json.loads((tmp_path / "talk.json").read_text())["turns"][0]["alphas"] == {"formal": 1.0, "b": 0.5}
    again = psr_chat(*arguments)
    assert again.exit_code == 2 and "is there already" in " ".join(again.stdout.split())


# ---------------------------------------------------------------- the embedded model


def test_embedded_model_takes_several_turns(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_path())
    save_adapter(tmp_path / "some", tiny_chat_path(), seed=1, model=base, alpha=0.01)
    adapters = {"some": str(tmp_path / "some")}
    session = ChatSession(*load_chat_model(base_model_of(adapters), adapters), "", 80, 0.0)
    first = session.ask("What is bread ?")
    assert first.cut is None
    prompt = session.ask("Is rain good ?").prompt
    start, n = first.prompt["input_ids"].shape[1], first.ids.shape[1]
    assert torch.equal(prompt["input_ids"][:, start : start + n], first.ids)
    assert prompt["steering_mask"][0].nonzero()[:, 0].tolist() == [
        *range(start - 1, start + n), prompt["input_ids"].shape[1] - 1,
    ]  # fmt: skip
    assert AutoTokenizer.from_pretrained(tiny_chat_path()).decode(first.ids[0]).strip() == first.text.strip()
