"""The house stays in order: files and folders of a size, and a map (docs/architecture.md) that names what is there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
FOLDERS = ("peft_psr", "training", "evaluation", "serving", "tests", "scripts", "benchmarks")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_no_long_file():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_full_folder():
    """`__init__.py` and a package's private modules are no ideas to find in a folder."""
    modules = Counter(path.parent.relative_to(ROOT) for path in FILES if not path.name.startswith("_"))
    most = {folder: 20 if folder.parts[0] == "tests" else 14 for folder in modules}
    assert {str(folder): count for folder, count in modules.items() if count > most[folder]} == {}


@pytest.mark.parametrize(
    "named", sorted(set(re.findall(r"`((?:peft_psr|training|evaluation|serving|tests)/[^`]*)`", ARCHITECTURE)))
)
def test_the_map_names_what_is_there(named):
    file, _, names = named.partition(": ")
    assert (ROOT / file).exists()
    for name in filter(None, names.split(", ")):
        assert re.search(
            rf"(def|class) {name}\b|^{name}\b[^\n]* = ", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
        )


def test_every_room_is_on_the_map():
    packages = [path.parent.relative_to(ROOT) for path in FILES if path.name == "__init__.py"]
    rooms = [room.as_posix() for room in packages if len(room.parts) == 2 and room.parts[0] != "tests"]
    assert [room for room in sorted(rooms) if f"`{room}/`" not in ARCHITECTURE] == []


def test_the_slow_half_is_there():
    listed = re.search(r'LONG = """(.*?)"""', (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), re.DOTALL)
    there = {path.stem.removeprefix("test_") for path in FILES}
    assert listed and set(listed[1].split()) - there == set()
