"""What the command imports for what is not the work itself, and the one way in which commands take options."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers.commands import psr
from helpers.paths import ROOT
from typer.main import get_command

from peft_psr.cli import app


HEAVY = {"torch", "transformers", "peft", "matplotlib", "openai", "huggingface_hub", "numpy", "datasets", "pyarrow"}

LIGHT = [
    (0, "--help"),
    (0, "recipes"),
    (0, "recipes fast"),
    (0, "methods"),
    (0, "train --help"),
    (0, "evaluate --help"),
    (0, "evaluate persona --help"),
    (2, "traim"),
    (2, "train fast --epoch 3 --output x"),
    (2, "train nosuch --output x --dry-run"),
    (2, "train fast --model m --triplets t --epochs many --output x --dry-run"),
    (2, "triplets embedded --draws ten --output x --dry-run"),
    (2, "evaluate persona nosuch --output x --dry-run"),
    (2, "evaluate persona persona-embedded --draws ten --output x --dry-run"),
    (2, "demo --trait grumpy"),
    (2, "chat x --seed -1"),
    (2, "show x"),
    (2, "compose x --weights 1 --output x --rank none_at_all"),
    (2, "push"),
    (2, "draft x"),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_nothing_heavy_is_imported_but_for_the_work():
    code = f"""
import json, os, sys
import typer, rich.console, pydantic, yaml  # what every command needs stays imported in the processes below
for expected, line in {LIGHT!r}:
    child = os.fork()
    if not child:
        sys.argv = ["psr", *line.split()]
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            from peft_psr.cli import main
            main()
        except SystemExit as ended:
            heavy = sorted({HEAVY!r} & set(sys.modules))
            if ended.code != expected or heavy:
                os.write(1, json.dumps([line, ended.code, heavy]).encode())
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_the_demo_waits_for_no_network():
    code = "import sys; sys.argv[1:] = ['demo', '--output', sys.argv[1], '--trait', 'grumpy']\n"
    code += "from peft_psr.cli import app\ntry: app()\nexcept SystemExit: pass\n"
    code += "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    settings = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code, "x"], capture_output=True, text=True, cwd=ROOT, env=settings)
    assert done.stdout.splitlines()[-1] == "True", done.stdout + done.stderr


# ---------------------------------------------------------------- options


def commands():
    """{what is typed: the command} of every command that does work."""
    root = get_command(app)
    found = {name: command for name, command in root.commands.items() if name not in ("recipes", "methods")}
    evaluate = found.pop("evaluate")
    return found | {f"evaluate {name}": evaluate.get_command(None, name) for name in evaluate.list_commands(None)}


@pytest.mark.parametrize("name", commands())
def test_every_command_takes_a_file_and_a_dry_run_and_words_mistakes_alike(name, tmp_path):
    words = {parameter.name for parameter in commands()[name].params}
    assert {"config", "dry_run", "output"} - words <= ({"output"} if name == "push" else set())
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({"nonsens": 3, "output": str(tmp_path / "x"), "dry-run": "perhaps"}))
    done = psr(*name.split(), "--config", file)
    assert done.exit_code == 2 and done.output.startswith("error: ") and "Traceback" not in done.output
    assert "dry_run: 'perhaps' is wrong; accepted: true | false. Check everything" in done.output
    file.write_text(json.dumps({"nonsens": 3, "output": str(tmp_path / "x")} if name != "push" else {"nonsens": 3}))
    done = psr(*name.split(), "--config", file, "--dry-run")
    assert done.exit_code == 2 and "unknown field nonsens (value 3)." in done.output
    assert not (tmp_path / "x").exists()


def test_flags_win_over_the_file_which_wins_over_the_recipe(tmp_path):
    file = tmp_path / "options.yaml"
    options = {"recipe": "embedded", "questions": 2, "draws": 2, "instructions": 1, "output": str(tmp_path / "x")}
    file.write_text(yaml.safe_dump(options | {"traits": ["sycophantic"], "dry_run": True}))
    assert "would draw 4 completions on 2 prompts" in psr("triplets", "--config", file).output
    done = psr("triplets", "--config", file, "--draws", 3, "--output", tmp_path / "y")
    assert "would draw 6 completions on 2 prompts" in done.output and f"write to {tmp_path / 'y'}/" in done.output
    wrong = psr("triplets", "--config", file, "--no-dry-run", "--draws", 0)
    assert wrong.exit_code == 2 and "draws: '0' is wrong; accepted: a whole number, at least 1" in wrong.output
    file.write_text("draws: yes\noutput: x\n")
    assert "draws: True is wrong" in psr("triplets", "embedded", "--config", file).output
