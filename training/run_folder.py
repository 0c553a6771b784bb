"""Whether a folder can take a run, and whether the run that was begun there is the one that is to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .folder_lock import LOCK


def check_run_folder(folder: Path, state: str, run: str) -> None:
    """Raise unless the folder is new, empty, or holds a run.

    Args:
        folder: The run's.
        state: The file that every run writes there first.
        run: What a run is called.

    Raises:
        FileExistsError: it holds something else.
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder.")
    names = {path.name for path in folder.glob("*")} - {LOCK, state + ".partial"}
    if names and state not in names:
        raise FileExistsError(f"{folder} is not empty and holds no {run} ({state}); name another folder.")


def check_same_recipe(folder: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ValueError` if fields of a recipe differ from those that the folder's run was begun with.

    Args:
        folder: The run's.
        begun: {field: value} as they were.
        now: As they are.
    """
    differ = sorted(name for name in {*begun, *now} if begun.get(name) != now.get(name))
    if differ:
        changes = ", ".join(f"{name}: {begun.get(name)!r} -> {now.get(name)!r}" for name in differ)
        raise ValueError(
            f"The run in {folder} was begun with another recipe ({changes}). Put the recipe back to go on with it, or "
            "name another folder."
        )
