"""`psr chat`: what is typed steers what is generated, and the last answer can be looked at."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.adapters import save_adapter
from helpers.commands import CHAT_WORDS, open_session, talk
from helpers.tokenizers import tiny_tokenizer
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_psr import tiny_chat_path
from peft_psr.hub.steered_model import base_model_of
from peft_psr.serving.chat import Chat, load_chat_model, name_adapters
from peft_psr.serving.chat_session import ChatSession


def by_hand(chat_folder, prompt, names=(), alphas=None, mask=None, new=8):
    """The ids that PEFT's own way of using adapters gives."""
    model = AutoModelForCausalLM.from_pretrained(chat_folder / "base").eval()
    steering = {}
    if names:
        model = PeftModel.from_pretrained(model, chat_folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(chat_folder / name, adapter_name=name)
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
def test_use_is_what_peft_does(chat_folder, session, names):
    session.use(names)
    pieces = []
    answer = session.ask("w1 w2", pieces.append)
    assert answer.ids[0].tolist() == by_hand(chat_folder, encode(session, FIRST), names) and answer.ids.numel()
    assert "".join(pieces) == answer.text == session.processing_class.decode(answer.ids[0])
    assert list(answer.alphas) == names == session.active


def test_combinations_differ(chat_folder, session):
    texts = set()
    for names in (["formal"], ["brief"], ["formal", "brief"], []):
        session.reset()
        session.use(names)
        texts.add(session.ask("w1 w2").text)
    assert len(texts) == 4


def test_alpha(chat_folder, session):
    session.use(["formal", "brief"])
    session.set_alpha(0.0)
    assert session.ask("w1 w2").ids[0].tolist() == by_hand(chat_folder, encode(session, FIRST))
    session.reset()
    session.set_alpha(-1.5, "brief")
    expected = by_hand(chat_folder, encode(session, FIRST), ["formal", "brief"], {"formal": 0.0, "brief": -1.5})
    assert session.ask("w1 w2").ids[0].tolist() == expected
    session.use([])
    with pytest.raises(ValueError, match="No adapter is active. Name one: /alpha formal 2"):
        session.set_alpha(2.0)


def test_second_turn_edits_the_first_answer_again(chat_folder, session):
    first = session.ask("w1 w2").ids[0].tolist()
    second = session.ask("w3").ids[0].tolist()
    prompt = encode(session, FIRST)
    rest = encode(session, "</t> <user> w3 </t> <assistant>")
    mask = [0] * (len(prompt) - 1) + [1] * (len(first) + 1) + [0] * (len(rest) - 1) + [1]
    ids = [*prompt, *first, *rest]
    assert session.last.prompt["input_ids"][0].tolist() == ids
    assert session.last.prompt["steering_mask"][0].tolist() == mask
    assert second == by_hand(chat_folder, ids, ["formal"], mask=mask) != by_hand(chat_folder, ids, ["formal"])
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_same_seed_same_answer(chat_folder):
    sampled = {"temperature": 1.0, "max_new_tokens": 12}
    texts = [open_session(chat_folder, seed=seed, **sampled).ask("w1").text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    session = open_session(chat_folder, seed=3, **sampled)
    state = torch.get_rng_state()
    session.ask("w1")
    session.reset()
    assert session.ask("w1").text == texts[0] and torch.equal(torch.get_rng_state(), state)


def test_system_turn(chat_folder, session):
    session.set_system("w9")
    expected = by_hand(chat_folder, encode(session, "<s> <system> w9 </t> <user> w1 </t> <assistant>"), ["formal"])
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


def test_gates_are_those_of_the_answer(chat_folder):
    session = open_session(chat_folder, temperature=5.0)  # an answer of many words
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


def test_names_in_two_unicode_forms_are_one(chat_folder):
    assert list(name_adapters(["nowhere/cafe\u0301", "cafe\u0301s=x"])) == ["café", "cafés"]
    session = ChatSession(
        *load_chat_model(str(chat_folder / "base"), {"café": str(chat_folder / "formal")}),
        max_new_tokens=8,
        temperature=0.0,
    )
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


def test_interrupted_answer_is_kept_as_far_as_it_got(chat_folder, session):
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


def test_full_context(chat_folder):
    session = open_session(chat_folder, max_new_tokens=100)  # of 128
    answer = session.ask(" ".join(["w1"] * 119))
    assert answer.cut == "context" and answer.prompt["input_ids"].shape[1] + answer.ids.shape[1] == 128
    before = list(session.messages)
    with pytest.raises(ValueError, match="has 13. tokens, and the model takes 128: /reset"):
        session.ask("w1")
    assert session.messages == before
    session.reset()
    assert session.ask("w1").ids.numel()


def test_answer_without_its_reasoning_becomes_the_turn(chat_folder, monkeypatch):
    session = open_session(chat_folder)
    session.processing_class = tiny_tokenizer(CHAT_WORDS.replace("w50", "</think>"))
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


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1"),
    ],
)
def test_settings_out_of_range(chat_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        open_session(chat_folder, **settings)


# ---------------------------------------------------------------- loading


# ---------------------------------------------------------------- the terminal


# ---------------------------------------------------------------- the command


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
        *range(start - 1, start + n),
        prompt["input_ids"].shape[1] - 1,
    ]
    assert AutoTokenizer.from_pretrained(tiny_chat_path()).decode(first.ids[0]).strip() == first.text.strip()
