"""Results and adapters kept under the hash of all that decides them: whole, or not there."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from peft_psr.evaluation.methods.method import Fitted
from peft_psr.files import read_json, write_json

from .cell import Result


FIT = "fit.json"
_KNOWN = ("dead_gates", "notes", "seconds", "bytes")


def kept_result(path: Path) -> Result | None:
    """What `keep_result` left in a file; `None` if there is none."""
    return read_json(path)["result"] if path.is_file() else None


def keep_result(path: Path, key: Mapping[str, Any], result: Result) -> Result:
    """Keep what was measured, with the `key` that decides it and whose hash names the file.

    Returns it as JSON gives it back, so that a first run and a rerun see the same.
    """
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**key, "result": result}, allow_nan=False)
    return read_json(path)["result"]


def kept_adapter(folder: Path, base: PreTrainedModel) -> Fitted | None:
    """The adapter that `keep_adapter` left in a folder, on its base model; `None` if there is none."""
    if not (folder / FIT).is_file():
        return None
    known = read_json(folder / FIT)
    return Fitted(PeftModel.from_pretrained(base, folder).eval(), **{name: known[name] for name in _KNOWN})


def keep_adapter(folder: Path, fitted: Fitted, parameters: Mapping[str, Any]) -> None:
    """Save an adapter, with what is known of it and what decided it, in a new folder, and set its `bytes`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    fitted.model.save_pretrained(str(partial))
    fitted.bytes = (partial / "adapter_model.safetensors").stat().st_size
    known = {name: getattr(fitted, name) for name in _KNOWN}
    write_json(partial / FIT, {**known, "parameters": dict(parameters)}, allow_nan=False)
    os.replace(partial, folder)
