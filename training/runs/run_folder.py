"""A run's folder: one process at a time, and whether it holds the run that is to go on."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peft_psr.files import check_folder, read_json


LOCK = ".lock"


def begun_run(folder: Path, state: str, run: str, fields: Collection[str] = ()) -> dict[str, Any]:
    """What the run that was begun in a folder has written down; empty if the folder is new or empty.

    Such a run, of the kind called `run`, writes the JSON file `state` there first, which holds its kind's `fields`.

    Raises:
        FileExistsError, NotADirectoryError: the folder holds something else; it is a file.
    """
    check_folder(folder)
    names = {path.name for path in folder.glob("*")} - {LOCK, state + ".partial"}
    begun = read_json(folder / state) if state in names else {}
    if names and not (state in names and set(fields) <= set(begun)):
        raise FileExistsError(f"{folder} is not empty and holds no {run} ({state}); name another folder.")
    return begun


def check_same_recipe(folder: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a recipe's {field: value} now differ from those that the folder's run was begun with."""
    differ = sorted(name for name in {*begun, *now} if begun.get(name) != now.get(name))
    if differ:
        changes = ", ".join(f"{name}: {begun.get(name)!r} -> {now.get(name)!r}" for name in differ)
        raise ValueError(
            f"The run in {folder} was begun with another recipe ({changes}). Put the recipe back to go on with it, or "
            "name another folder."
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be and hold its lock, which the system frees when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"Another process is at work in {folder}. Wait for it or stop it; the system frees the folder when it "
            "ends."
        ) from None
    try:
        yield
    finally:
        lock.release()
