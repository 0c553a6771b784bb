"""`psr show`: the numbers against plain forward calls, in the terminal and on a page."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.adapters import save_adapter
from helpers.commands import Page, check_stands_alone, psr
from helpers.models import LAYERS, tiny_model
from helpers.tokenizers import tiny_tokenizer

from peft_psr import PSRConfig
from peft_psr.evaluation.inspection import token_map
from peft_psr.evaluation.inspection.shading import DIGITS, shade, token_texts
from peft_psr.evaluation.inspection.token_map import TokenMap, map_adapters, token_page
from peft_psr.hub.steered_model import load_with_adapters
from peft_psr.serving.chat import load_chat_model
from peft_psr.training.data.draws import Completion


WORDS = " ".join(f"w{i}" for i in range(57))  # one for each of the model's tokens, so that text can be encoded again
QUESTION, ANSWER, INSTRUCTION = "w1 w2", "w5 w6 w7 w8", "w20 w21 w22"
PLAIN = f"<s> <user> {QUESTION} </t> <assistant> {ANSWER} </t>"
PROMPTED = f"<s> <system> {INSTRUCTION} </t> <user> {QUESTION} </t> <assistant> {ANSWER} </t>"
EDITED = 6  # the last prompt token, the answer, the end of the turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter of one layer, and one of all layers with two ranks on more tokens."""
    folder = tmp_path_factory.mktemp("show")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer(WORDS).save_pretrained(folder / "base")
    wide = {"std": 0.3, "gate_std": 0.3}
    save_adapter(folder / "one", folder / "base", seed=1, **wide, layers_to_transform=2, alpha=0.5)
    save_adapter(folder / "all", folder / "base", seed=2, **wide, r=2, positions="question_and_response")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_chat_model(str(folder / "base"), {name: str(folder / name) for name in ("one", "all")})


@torch.no_grad()
def streams(model, text, tokens=EDITED, **settings):
    """Outputs of the decoder layers at the last tokens of a text, (layers, tokens, d)."""
    ids = torch.tensor([tiny_tokenizer(WORDS)(text, add_special_tokens=False)["input_ids"]])
    found, hooks = [], []
    for layer in model.get_submodule("model.layers"):
        hooks.append(layer.register_forward_hook(lambda module, args, output: found.append(output)))
    try:
        model(input_ids=ids, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([(output[0] if isinstance(output, tuple) else output)[0, -tokens:] for output in found])


# ---------------------------------------------------------------- numbers


def test_gates_and_changes_worked_out_by_hand(loaded):
    model, tokenizer = loaded
    one, both = map_adapters(model, tokenizer, QUESTION, ANSWER, INSTRUCTION)
    base = streams(tiny_model(), PLAIN)
    assert one.name == "one" and "".join(one.tokens).split() == ["<assistant>", *ANSWER.split(), "</t>"]
    unit = model.psr_layers()[2].unit("one")
    gates = (base[2] @ unit.gate_weight.T + unit.gate_bias).relu()[:, 0]
    assert list(one.gates) == [2] and torch.allclose(one.gates[2], gates, atol=1e-5) and gates.max() > 0.1
    prompted = streams(tiny_model(), PROMPTED)
    expected = (prompted - base).norm(dim=-1) / base.norm(dim=-1)
    assert torch.allclose(one.prompt, expected, atol=1e-5)
    edit = 0.5 * (gates[:, None] @ unit.direction)
    assert not one.adapter[:2].any()
    assert torch.allclose(one.adapter[2], edit.norm(dim=-1) / base[2].norm(dim=-1), atol=1e-5)

    assert "".join(both.tokens).split()[-EDITED - 3 : -EDITED] == [*QUESTION.split(), "</t>"]  # the question too
    assert list(both.gates) == both.layers == list(range(LAYERS))
    assert torch.allclose(both.prompt[:, -EDITED:], expected, atol=1e-5)
    unit = model.psr_layers()[0].unit("all")
    wide = (streams(tiny_model(), PLAIN, len(both.tokens))[0] @ unit.gate_weight.T + unit.gate_bias).relu().sum(dim=-1)
    assert torch.allclose(both.gates[0], wide, atol=1e-5)


def test_each_adapter_alone(folder, loaded):
    together = map_adapters(*loaded, QUESTION, ANSWER)
    for name, of_two in zip(("one", "all"), together, strict=True):
        (alone,) = map_adapters(*load_chat_model(str(folder / "base"), {name: str(folder / name)}), QUESTION, ANSWER)
        assert torch.equal(alone.adapter, of_two.adapter) and alone.prompt is None
        assert torch.equal(torch.stack([*alone.gates.values()]), torch.stack([*of_two.gates.values()]))


def test_each_answer_is_steered_by_the_adapter_it_is_looked_at_through(folder, loaded):
    loaded[0].set_adapter("all")
    for own in map_adapters(*loaded, QUESTION, max_new_tokens=9):
        adapter = {own.name: str(folder / own.name)}
        (alone,) = map_adapters(*load_chat_model(str(folder / "base"), adapter), QUESTION, max_new_tokens=9)
        assert alone.tokens == own.tokens


def test_answer_of_its_own_is_steered_and_repeatable(loaded, monkeypatch):
    model, tokenizer = loaded
    first, again, other = (map_adapters(model, tokenizer, QUESTION, max_new_tokens=9, seed=s) for s in (0, 0, 1))
    assert [each.tokens for each in first] == [each.tokens for each in again] != [each.tokens for each in other]
    assert first[0].tokens[-1] != " </t>" and first[0].tokens != first[1].tokens  # cut off; each its own
    monkeypatch.setattr(token_map, "sample_completions", lambda *args, **settings: [Completion("", True)])
    with pytest.raises(ValueError, match="Steered by 'one' the model answers nothing"):
        map_adapters(model, tokenizer, QUESTION)


def example(gates, prompt=None, tokens=None):
    prompt = None if prompt is None else torch.tensor(prompt)
    width = len(next(iter(gates.values())))
    return TokenMap(
        name="a",
        config=PSRConfig(alpha=1.5),
        tokens=tokens or [f" t{i}" for i in range(width)],
        gates={layer: torch.tensor(values) for layer, values in gates.items()},
        layers=[0, 1],
        adapter=torch.zeros(2, width),
        prompt=prompt,
    )


def test_shades():
    # layers count alike, whatever the unit of their gates; a dead layer counts nothing
    openness = example({0: [0.0, 1.0, 2.0], 5: [1000.0, 0.0, 500.0], 7: [0.0, 0.0, 0.0]}).openness()
    assert openness.tolist() == pytest.approx([1 / 1.5, 0.5 / 1.5, 1.0])
    assert example({0: [0.0, 0.0]}).openness().tolist() == [0.0, 0.0]
    strength = example({0: [1.0] * 4}, [[2.0, 0.2, 0.02, 0.0], [0.0, 0.0, 0.0, 0.0]]).prompt_strength()
    assert strength.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="no instruction"):
        example({0: [1.0]}).prompt_strength()
    text = shade(["a", "", " b"], [1.0, 0.3, 0.0], digits=True)
    assert text.plain == f"a{DIGITS[9]} b{DIGITS[0]}" and shade(["a"], [0.5]).plain == "a"


def test_a_line_end_that_is_a_token_is_seen():
    texts, strengths = ["\n", "Tea", ".\n", " \n\n", "\n"], [1.0, 0.0, 0.5, 0.2, 0.9]
    assert shade(texts, strengths, digits=True).plain == "↵⁹\nTea⁰.⁴\n ↵↵²\n\n↵⁸\n"
    coloured = shade(texts, strengths)
    assert coloured.plain == "↵\nTea.\n ↵↵\n\n↵\n" and len(coloured.spans) == len(texts)
    page = Page(token_page([example({0: [1.0, 0.0]}, tokens=["\n", "a\n"])], "q"))
    assert [element["text"] for element in page.all("span")] == ["↵\n", "a\n"]


@pytest.mark.parametrize(
    ("encoding", "digit", "newline"),
    [
        ("utf-8", "⁹", "↵"),
        ("utf-16", "⁹", "↵"),
        ("cp1252", "[9]", "\\n"),
        ("latin-1", "[9]", "\\n"),
        ("ascii", "[9]", "\\n"),
    ],
)
def test_signs_that_the_encoding_has(encoding, digit, newline):
    text = shade(["\n", "tea"], [1.0, 1.0], digits=True, encoding=encoding).plain
    assert text == f"{newline}{digit}\ntea{digit}" and text.encode(encoding)


def test_token_texts_add_up_to_the_text():
    class Bytes:
        def decode(self, ids, skip_special_tokens=False):
            return bytes(ids).decode(errors="replace")

    ids = list("é€a🙂".encode())
    assert token_texts(Bytes(), ids) == ["", "é", "", "", "€", "a", "", "", "", "🙂"]
    assert "".join(token_texts(Bytes(), ids[:-1])) == Bytes().decode(ids[:-1])  # cut inside a letter


# ---------------------------------------------------------------- the page


def test_page_escapes_and_holds_every_number():
    nasty = "<script>alert('x')</script>\"&"
    gates = {0: [0.0, 1.25], "x.<b>": [4.0, 2.0]}
    text = token_page([example(gates, [[0.5, 0.05], [0.25, 0.001]], [nasty, "\n"])], nasty, nasty, nasty)
    check_stands_alone(text)
    page = Page(text)
    assert nasty in [element["text"] for element in page.all("dd")]
    assert [element["text"] for element in page.all("th") if element.get("scope") == "row"].count("\\n") == 3
    titles = [element["title"] for element in page.all("td")]
    assert titles == [
        f"{nasty}, layer 0: 0", f"{nasty}, layer x.<b>: 4", "\\n, layer 0: 1.25", "\\n, layer x.<b>: 2",
        f"{nasty}, layer 0: 0", f"{nasty}, layer 1: 0", "\\n, layer 0: 0", "\\n, layer 1: 0",
        f"{nasty}, layer 0: 0.5", f"{nasty}, layer 1: 0.25", "\\n, layer 0: 0.05", "\\n, layer 1: 0.001",
    ]  # fmt: skip
    colours = [float(element["style"].removeprefix("--s:")) for element in page.all("td")]
    assert colours[:4] == [0, 1, 1, 0.5] and not any(colours[4:8])
    assert colours[8:] == pytest.approx([1, 1 - 0.30103 / 2, 0.5, 0], abs=1e-3)
    flow = [element["text"] for element in page.all("span")]
    assert flow == 2 * [nasty, "↵\n"] and "alpha 1.5" in text


def test_page_without_an_instruction():
    page = Page(token_page([example({0: [1.0, 0.0]}), example({1: [0.0, 0.0]})], "w1"))
    assert len(page.all("section")) == 2 and len(page.all("table")) == 4
    assert [element["text"] for element in page.all("dt")] == ["prompt"]


# ---------------------------------------------------------------- the command


def test_command(folder, tmp_path):
    page = tmp_path / "map.html"
    done = psr(
        "show", folder / "one", "--text", QUESTION, "--answer", ANSWER, "--instruction", INSTRUCTION, "--output", page
    )
    assert done.exit_code == 0, done.output
    gates, moves = re.findall(r"^<assistant>.*", done.output, flags=re.MULTILINE)
    for line in (gates, moves):
        assert line.translate({ord(digit): None for digit in DIGITS}).split() == f"<assistant> {ANSWER} </t>".split()
        assert len(re.findall(f"[{DIGITS}]", line)) == EDITED and DIGITS[9] in line
    assert "one, gates:" in done.output and "one, what the instruction moves:" in done.output
    text = page.read_text()
    check_stands_alone(text)
    assert "Change by the instruction" in text and len(Page(text).all("td")) == EDITED * (1 + 2 * LAYERS)


def test_command_takes_options_from_a_file(folder, tmp_path):
    (tmp_path / "options.yaml").write_text(f"prompt: {QUESTION}\nmax-new-tokens: 3\nseed: 4\n")
    first, again = (
        psr("show", folder / "one", folder / "all", "--config", tmp_path / "options.yaml") for _ in range(2)
    )
    assert first.exit_code == 0 and first.output == again.output
    assert "all, gates:" in first.output and "instruction moves" not in first.output


def test_command_line_mistakes(folder, tmp_path):
    page = tmp_path / "map.html"
    dry = psr("show", folder / "one", "--prompt", QUESTION, "--output", page, "--dry-run")
    assert dry.exit_code == 0 and "would show one" in dry.output and not page.exists()
    page.touch()
    for message, arguments in {
        "is there already": ("--output", page),
        "placement must be one of": ("--instruction", INSTRUCTION, "--placement", "middle"),
    }.items():
        wrong = psr("show", folder / "one", "--prompt", QUESTION, "--dry-run", *arguments)
        assert wrong.exit_code == 2 and message in wrong.output
    assert psr("show", folder / "one").exit_code == 2
    lost = psr("show", folder / "lost", "--prompt", QUESTION)
    assert lost.exit_code == 2 and "error:" in lost.output


def test_plain_text_where_the_model_has_no_chat_template(folder, tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = None
    tiny_model().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    model, tokenizer = load_with_adapters(str(tmp_path / "plain"), {"one": str(folder / "one")})
    (shown,) = map_adapters(model, tokenizer, "w1 w2", " w5 w6", "w20", "before")
    assert [token.strip() for token in shown.tokens[:3]] == ["w2", "w5", "w6"]
    ids = tokenizer("w1 w2 w5 w6", return_tensors="pt", add_special_tokens=False)["input_ids"]
    (gates,) = model.gate_values(ids, steering_mask=torch.tensor([[0, 1, 1, 1]])).values()
    torch.testing.assert_close(shown.gates[2][:3], gates[0, 1:4].sum(dim=-1))
    with pytest.raises(ValueError, match="placement='before'"):
        map_adapters(model, tokenizer, "w1 w2", " w5 w6", "w20")
