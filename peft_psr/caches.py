"""A forward call's cache by either name: transformers calls it `cache` from 5.24 on, `past_key_values` before that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


CACHE_NAMES = ("cache", "past_key_values")


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward call, or in a model's output; `None` if there is none."""
    return next((given.get(name) for name in CACHE_NAMES if given.get(name) is not None), None)


def cache_name(forward: Callable) -> str:
    """What `forward` calls the cache that it takes."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), CACHE_NAMES[-1])
