"""`psr triplets`, `psr recipes` and `psr draft`: options, dry run, errors."""

from __future__ import annotations

import json

import pytest
from helpers.commands import psr
from typer.main import get_command

from peft_psr.cli import app
from peft_psr.training.runs.triplets.recipe import Recipe, load_recipe, shipped_recipes


SMALL = ["embedded", "--instructions", 1, "--questions", 3, "--draws", 2]


def test_every_field_of_a_recipe_is_an_option():
    options = {parameter.opts[0] for parameter in get_command(app).commands["triplets"].params}
    assert {f"--{name.replace('_', '-')}" for name in Recipe.model_fields} <= options
    assert psr("triplets", "--help").exit_code == 0


def test_triplets_end_to_end_and_again(tmp_path):
    done = psr("triplets", *SMALL, "--output", tmp_path / "run")
    assert done.exit_code == 0 and "of 6 completions as triplets" in done.output
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["recipe"]["draws"] == 2 and manifest["recipe"]["traits"] == ["sycophantic"]
    assert (
        psr("triplets", *SMALL, "--output", tmp_path / "run").output.splitlines()[-1] == done.output.splitlines()[-1]
    )
    other = psr("triplets", *SMALL, "--seed", 1, "--output", tmp_path / "run")
    assert other.exit_code == 2 and "begun with another recipe (seed: 0 -> 1)" in other.output


def test_a_dry_run_writes_nothing(tmp_path):
    done = psr("triplets", *SMALL, "--dry-run", "--output", tmp_path / "run")
    assert done.exit_code == 0 and "would draw 6 completions on 3 prompts" in done.output
    assert "completions: at most 576 tokens" in done.output and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embedded", "--draws", "ten"], "draws: 'ten' is wrong; accepted: a whole number, at least 1"),
        (["nowhere.yaml"], "No recipe file 'nowhere.yaml'"),
        (["embedded", "--traits", "rude"], "source: embedded has no 'rude'"),
        (["embedded", "--placement", "before", "--model", "/nowhere", "--dry-run"], "/nowhere"),
    ],
)
def test_errors_are_one_line_without_a_trace(tmp_path, arguments, message):
    failed = psr("triplets", *arguments, "--output", tmp_path / "run")
    assert failed.exit_code == 2 and message in failed.output and "Traceback" not in failed.output


def test_recipes(tmp_path):
    listed = psr("recipes").output
    assert all(name in listed for name in shipped_recipes())
    (tmp_path / "my.yaml").write_text(psr("recipes", "personas-server").output)
    assert load_recipe(tmp_path / "my.yaml") == load_recipe("personas-server")
    assert "No recipe 'nope' ships" in psr("recipes", "nope").output


def test_draft(tmp_path):
    from helpers.unruly_server import MODEL, UnrulyServer

    draft = {
        "instruction": [{"pos": f"Be formal in way {i}.", "neg": f"Be casual in way {i}."} for i in range(5)],
        "questions": [f"What is thing number {i}?" for i in range(40)],
        "rubric": "Formal words count.",
    }
    with UnrulyServer(reply=lambda body: json.dumps(draft)) as server:
        done = psr(
            "draft", "formal", "speaks formally", "--model", MODEL, "--server-url", server.url, "--output", tmp_path
        )
    assert done.exit_code == 0 and "read both files over" in done.output
    dry = psr("triplets", "personas-server", "--data", tmp_path, "--traits", "formal", "--dry-run", "--output",
              tmp_path / "run")  # fmt: skip
    assert "would draw 2000 completions on 200 prompts" in dry.output
    again = psr("draft", "formal", "speaks formally", "--model", MODEL, "--server-url", "http://localhost:1/v1",
                "--output", tmp_path)  # fmt: skip
    assert again.exit_code == 2 and "exists; a draft would replace it" in again.output


def test_more_fields_of_each_request(tmp_path):
    from helpers.unruly_server import MODEL, UnrulyServer

    fields = {"chat_template_kwargs": {"enable_thinking": False}}
    seen = []

    def reply(body):
        seen.append(body)
        return "80"

    with UnrulyServer(reply=reply) as server:
        done = psr("triplets", "personas-server", "--traits", "formal", "--questions", 1, "--draws", 1,
                   "--model", MODEL, "--judge-model", MODEL, "--server-url", server.url,
                   "--server-fields", json.dumps(fields), "--judge-fields", "{\"top_k\": 5}",
                   "--output", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    drawn = [body for body in seen if "chat_template_kwargs" in body]
    judged = [body for body in seen if "top_k" in body]
    assert drawn and judged and len(drawn) + len(judged) == len(seen)
    assert all(body["chat_template_kwargs"] == fields["chat_template_kwargs"] for body in drawn)
    wrong = psr("triplets", "personas-server", "--server-fields", "[1]", "--output", tmp_path / "x")
    assert wrong.exit_code == 2 and "accepted: a JSON object" in wrong.output
