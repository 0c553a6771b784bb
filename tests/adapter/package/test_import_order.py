"""Importing `peft_psr` imports neither torch nor PEFT, and registers the type whatever is imported first, by whom."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.adapters import save_adapter
from helpers.models import tiny_model
from helpers.paths import ROOT

import peft_psr


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "peft_psr").rglob("*.py")
    if "cli" not in path.parts and not path.stem.startswith("__")
)
"""Every module that `import peft_psr` may find first, without PEFT."""

PREPARED = """
import os, sys, traceback
import torch, transformers, peft  # what PEFT needs stays imported in the processes below, which makes them cheap
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]

def check():
    import peft_psr
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
    assert configs["PSR"] is peft_psr.PSRConfig and tuners["PSR"] is peft_psr.PSRModel
    assert not [finder for finder in sys.meta_path if "AfterPeft" in type(finder).__name__]

def alone(code):
    child = os.fork()
    if not child:
        try:
            exec(code, {})
            check()
        except BaseException:
            print(code)
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


THREADS = """
import peft_psr, sys, threading, time, importlib
def other():
    while "peft" not in sys.modules:
        time.sleep(0)
    importlib.import_module({module!r})
threads = [threading.Thread(target=importlib.import_module, args=("peft",)), threading.Thread(target=other)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
"""One imports PEFT, whose registration needs a module that the other is importing and that waits for PEFT.

PEFT's own modules can't be imported by two threads at once, so the other begins with one that wants `peft` itself.
"""


def run(code):
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_registered_in_any_order(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "formal", tmp_path / "base", seed=1)
    (tmp_path / "config").write_bytes(pickle.dumps(peft_psr.PSRConfig(r=3)))
    base, formal, pickled = (str(tmp_path / name) for name in ("base", "formal", "config"))
    orders = [
        "import peft, peft_psr",
        "import peft_psr, peft",
        "import peft_psr; from peft import PeftModel",
        "from peft_psr import *; PSRConfig(), PSRModel",
        "import peft_psr; peft_psr.PSRConfig",
        "import peft_psr; peft_psr.layer.PSRLayer",
        "import peft_psr, importlib; importlib.reload(peft_psr); import peft; importlib.reload(peft)",
        "import peft_psr, peft, importlib; importlib.reload(peft_psr)",
        "import peft_psr, sys; [sys.modules.pop(name) for name in {*sys.modules} if 'peft_psr' in name]; import peft",
        "import peft_psr.training; peft_psr.training.PSRTrainer",
        "from peft_psr.evaluation import calibrate_alpha",
        "import peft_psr.chat",  # an old path
        *(f"import {module}, peft" for module in MODULES),
        *(THREADS.format(module=f"peft_psr.{module}") for module in ("config", "rows", "hub.push") * 3),
        f"import pickle; assert pickle.load(open({pickled!r}, 'rb')).r == 3",
        f"import peft_psr; from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({formal!r})",
        f"import peft_psr; from transformers import AutoModelForCausalLM as M; M.from_pretrained({formal!r})",
        f"import peft_psr; from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({base!r}).load_adapter({formal!r})",
    ]
    assert run(f"{PREPARED}\nprint('failed:', sum(alone(order) for order in {orders!r}))").endswith("failed: 0")


def test_importing_the_packages_imports_nothing_heavy():
    code = "import peft_psr, peft_psr.training, peft_psr.evaluation, peft_psr.serving, json, sys; print(json.dumps("
    heavy = {"torch", "transformers", "peft", "huggingface_hub", "numpy", "pydantic"}
    assert not heavy & set(json.loads(run(f"{code}list(sys.modules)))")))


@pytest.mark.parametrize("package", ["peft_psr", "peft_psr.training", "peft_psr.evaluation"])
def test_public_names_are_what_type_checkers_see(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    checking = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in checking.body for alias in node.names}
    assert set(seen) == set(module.__all__) - {"__version__"}
    for name in seen:
        value = getattr(module, name)
        assert value.__name__ == name and value.__module__.startswith("peft_psr.") and name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'PSRConfg'"):
        module.PSRConfg  # noqa: B018
