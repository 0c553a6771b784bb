"""A forward call's cache by either name: transformers calls it `cache` from 5.24 on, `past_key_values` before that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


CACHE_NAMES = ("cache", "past_key_values")


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward call, or in a model's output; `None` if there is none."""
    return first_given(given.get(name) for name in CACHE_NAMES)


def first_given(values: Iterable[Any]) -> Any:
    """The first that is not `None`, if any is: in a loop, since torch before 2.8 compiles no `next` with a default."""
    for value in values:
        if value is not None:
            return value
    return None


def cache_name(forward: Callable) -> str:
    """What `forward` calls the cache that it takes."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), CACHE_NAMES[-1])
