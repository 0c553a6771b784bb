"""Things of a kind by name, loaded when they are asked for: listing what there is loads nothing."""

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar, cast


T = TypeVar("T")


def loaded(entry: T | str) -> T:
    """An object, or what stands at "module:object", imported now."""
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return cast(T, getattr(import_module(module), attribute))


class Registry(Generic[T]):
    """Objects of one kind by name.

    Args:
        kind: What they are, as messages call it: "objective", say.
        entries: {name: the object, or "module:object" where it is}, in the order in which they are listed.
    """

    def __init__(self, kind: str, entries: Mapping[str, T | str]) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = dict(entries)

    def __getitem__(self, name: str) -> T:
        """The object of a name; raises `ValueError` if there is none."""
        entry = self._entries[name] = loaded(self._entries[self.check(name)])
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, entry: T | str) -> None:
        """Adds an object, or "module:object" where it is; raises `ValueError` if the name is taken."""
        if name in self._entries:
            raise ValueError(f"There is a {self.kind} {name!r} already; name yours otherwise.")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Takes an object out again; raises `ValueError` if there is none of that name."""
        del self._entries[self.check(name)]

    def check(self, name: str) -> str:
        """The name itself; raises `ValueError`, with the nearest one and all there are, if there is none of it."""
        if name in self._entries:
            return name
        near = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no {self.kind} {name!r}; there are: {', '.join(self._entries)}.{hint}")
