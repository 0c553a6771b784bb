"""Results and adapters kept under the hash of all that decides them: whole, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from peft_psr.files import write_whole

from .method import Fitted


FIT = "fit.json"
_KNOWN = ("dead_gates", "notes", "seconds", "bytes")


def digest(data: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of some JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def as_json(data: Any) -> str:
    """JSON as files hold it; raises `ValueError` for a number that is not finite."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def kept_result(path: Path, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, or what is computed now and kept there.

    Args:
        path: Named by the hash of `key`.
        key: What decides the result; kept beside it.
        compute: Returns JSON.

    Returns:
        The result as JSON gives it back, so that a first run and a rerun see the same.
    """
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, as_json({**key, "result": compute()}))
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def kept_adapter(folder: Path, base: PreTrainedModel) -> Fitted | None:
    """The adapter that `keep_adapter` left in a folder, on its base model; `None` if there is none."""
    if not (folder / FIT).is_file():
        return None
    known = json.loads((folder / FIT).read_text(encoding="utf-8"))
    return Fitted(PeftModel.from_pretrained(base, folder).eval(), **{name: known[name] for name in _KNOWN})


def keep_adapter(folder: Path, fitted: Fitted, parameters: Mapping[str, Any]) -> None:
    """Save an adapter with what is known of it, and set its `bytes`.

    Args:
        folder: Named by the hash of `parameters`; not there yet.
        fitted: The adapter.
        parameters: What decided it.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    fitted.model.save_pretrained(str(partial))
    fitted.bytes = (partial / "adapter_model.safetensors").stat().st_size
    known = {name: getattr(fitted, name) for name in _KNOWN}
    write_whole(partial / FIT, as_json({**known, "parameters": dict(parameters)}))
    os.replace(partial, folder)
