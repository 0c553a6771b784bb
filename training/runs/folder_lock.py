"""One process at a time in a run's folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be and hold its lock, which the system frees when the process ends, however it ends.

    Args:
        folder: The run's folder.

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
