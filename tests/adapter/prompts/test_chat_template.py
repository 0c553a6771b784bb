"""Arguments of a chat template become part of it: what is rendered, hashed and saved."""

from __future__ import annotations

import pytest
from helpers.tokenizers import CHATML, THINKING, byte_tokenizer
from transformers import AutoTokenizer

from peft_psr.prompts.chat_template import read_chat_template, set_chat_template, template_args_of
from peft_psr.prompts.conversations import render_prompt
from peft_psr.training.data.draws import template_hash


USER = [{"role": "user", "content": "what is tea"}]
MACRO = "{% macro head(m) %}{{ m['role'] }}{{ mark }}{% endmacro %}\n{% for m in messages %}{{ head(m) }}{% endfor %}"


@pytest.mark.parametrize("template", [THINKING, MACRO, "\n{{ flag }}{{ messages[0]['content'] }}", CHATML])
@pytest.mark.parametrize(
    "args",
    [
        {"enable_thinking": False},
        {"mark": "a#}\n'\"%}é", "flag": None, "more": [1, {"a": True}, 2.5]},
        {"flag": 0, "mark": ""},
    ],
)
def test_as_if_given_at_each_call(template, args):
    given, plain = byte_tokenizer(template), byte_tokenizer(template)
    set_chat_template(given, template_args=args)
    expected = plain.apply_chat_template(USER, tokenize=False, add_generation_prompt=True, **args)
    assert render_prompt(given, USER) == expected
    assert template_args_of(given) == args and template_args_of(plain) == {}


def test_other_arguments_are_another_template(tmp_path):
    tokenizer = byte_tokenizer(THINKING)
    hashes = {template_hash(tokenizer.chat_template)}
    for args in ({"enable_thinking": False}, {"enable_thinking": True}):
        set_chat_template(tokenizer, template_args=args)
        hashes.add(template_hash(tokenizer.chat_template))
    assert len(hashes) == 3
    tokenizer.save_pretrained(tmp_path)
    assert template_args_of(AutoTokenizer.from_pretrained(tmp_path)) == {"enable_thinking": True}
    set_chat_template(tokenizer)
    assert template_args_of(tokenizer) == {"enable_thinking": True}
    set_chat_template(tokenizer, template_args={})
    assert tokenizer.chat_template == THINKING


def test_every_named_template_has_them():
    tokenizer = byte_tokenizer({"default": THINKING, "tool_use": THINKING})
    set_chat_template(tokenizer, template_args={"enable_thinking": False})
    assert render_prompt(tokenizer, USER).endswith("</think>\n\n")
    assert all("enable_thinking = False" in text for text in tokenizer.chat_template.values())


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "two words", "", "true", "none"])
def test_names_that_can_be_none(name):
    with pytest.raises(ValueError, match="can't be an argument of a chat template"):
        set_chat_template(byte_tokenizer(), template_args={name: 1})


def test_values_that_are_no_json():
    with pytest.raises(TypeError):
        set_chat_template(byte_tokenizer(), template_args={"flag": {1, 2}})
    with pytest.raises(TypeError, match="not JSON"):
        set_chat_template(byte_tokenizer(), template_args={"flag": float("nan")})


def test_without_a_template(tmp_path):
    tokenizer = byte_tokenizer(None)
    with pytest.raises(ValueError, match="has no chat template to give the arguments.*--chat-template"):
        set_chat_template(tokenizer, template_args={"flag": 1})
    file = tmp_path / "own.jinja"
    file.write_text(CHATML, encoding="utf-8")
    set_chat_template(tokenizer, read_chat_template(file), {})
    assert "what is tea" in render_prompt(tokenizer, USER)
    with pytest.raises(FileNotFoundError, match="chat_template: no file"):
        read_chat_template(tmp_path / "none.jinja")
    file.write_bytes("{{ 'é' }}".encode("utf-16"))
    with pytest.raises(ValueError, match="own.jinja is UTF-16"):
        read_chat_template(file)
    file.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        read_chat_template(file)
