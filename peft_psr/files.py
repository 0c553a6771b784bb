"""Files that are whole or as they were before; JSON and figures in them, and what data hashes to."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any


_HALF_PAIR = re.compile("[\ud800-\udfff]")


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that it is whole or as it was; errors as `not_written`."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(encode(content) if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise not_written(error, path) from error


def check_file(path: str | os.PathLike, option: str) -> None:
    """Raise `FileNotFoundError`, naming the option that it was given by, if there is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}: no file {str(path)!r}.")


def check_folder(path: str | os.PathLike) -> None:
    """Raise `NotADirectoryError` if there is a file where a folder is to be."""
    if Path(path).exists() and not Path(path).is_dir():
        raise NotADirectoryError(f"{path} is a file; name a folder.")


def check_new_folder(path: str | os.PathLike) -> None:
    """Raise `FileExistsError` unless a folder is empty or to be made; `NotADirectoryError` if it is a file."""
    check_folder(path)
    if Path(path).exists() and any(Path(path).iterdir()):
        raise FileExistsError(f"{path} is not empty; name another folder or empty it.")


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file of ours holds; `OSError` if it can't be read, `ValueError` if it is no JSON in UTF-8."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | os.PathLike, data: Any, allow_nan: bool = True) -> None:
    """Write JSON as `as_json` lays it out, with `write_whole`."""
    write_whole(path, as_json(data, allow_nan))


def as_json(data: Any, allow_nan: bool = True) -> str:
    """JSON as files hold it; `ValueError` for a number that is not finite, without `allow_nan`."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def as_json_lines(rows: Iterable[Any]) -> str:
    """JSONL: each row on a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def digest(data: Any, digits: int = 64) -> str:
    """The first hexadecimal digits of the SHA-256 of some JSON, in whatever order its keys come.

    Runs that were begun before are known by it: it must not change.
    """
    return sha256(json.dumps(data, sort_keys=True))[:digits]


def sha256(content: str | bytes) -> str:
    """The SHA-256 of bytes, or of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(encode(content) if isinstance(content, str) else content).hexdigest()


def as_png(figure: Any, dpi: int = 130) -> bytes:
    """A matplotlib figure as PNG, the same bytes for the same figure."""
    image = BytesIO()
    figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()


def encode(text: str) -> bytes:
    r"""UTF-8, with half a surrogate pair, which JSON may hold and UTF-8 may not, as its escape (\ud83d)."""
    return text.encode("utf-8", "backslashreplace")


def has_half_pair(text: str) -> bool:
    """Whether text holds half a surrogate pair: half of an emoji, for one, that was cut in two."""
    return _HALF_PAIR.search(text) is not None


def without_half_pairs(text: str) -> str:
    """The text without halves of surrogate pairs, which no tokenizer and no file in UTF-8 takes."""
    return _HALF_PAIR.sub("", text)


def not_written(error: OSError, path: Path) -> OSError:
    """An error that says which file it was and what to do."""
    return OSError(
        error.errno,
        f"{error.strerror or error}: {path} could not be written. Nothing before it is lost: make room, then start "
        "the same command again",
    )
