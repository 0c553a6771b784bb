"""Whether a folder can take a run, and whether the run that was begun there is the one that is to go on."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft_psr.files import check_folder, read_json

from .folder_lock import LOCK


def begun_run(folder: Path, state: str, run: str, fields: Collection[str] = ()) -> dict[str, Any]:
    """What the run that was begun in a folder has written down; empty if the folder is new or empty.

    Args:
        folder: The run's.
        state: The JSON file that every run writes there first.
        run: What a run is called.
        fields: What the file holds, by which it is known from that of another kind of run.

    Raises:
        FileExistsError: the folder holds something else.
        NotADirectoryError: it is a file.
    """
    check_folder(folder)
    names = {path.name for path in folder.glob("*")} - {LOCK, state + ".partial"}
    begun = read_json(folder / state) if state in names else {}
    if names and not (state in names and set(fields) <= set(begun)):
        raise FileExistsError(f"{folder} is not empty and holds no {run} ({state}); name another folder.")
    return begun


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
