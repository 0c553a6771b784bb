"""Packages whose public names are imported when they are asked for, so that importing the package costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazily(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562), with which its modules are attributes of it too.

    Args:
        package: Its `__name__`.
        names: {module: its public names, with blanks between them}.
    """
    modules = {name: module for module, written in names.items() for name in written.split()}

    def load(name: str) -> Any:
        """The object of a public name, or a module."""
        if name in modules:
            value = getattr(import_module(modules[name]), name)
        elif not name.startswith("__") and find_spec(f"{package}.{name}") is not None:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *modules})
