"""A forward call's cache by either name: transformers calls it `cache` from 5.24 on, `past_key_values` before that.

A cache that a plain forward call filled is marked: that call took its text for a prompt and edited the last token.
Where `generate` goes on from there, the text was a prefix, and that token has to be computed again.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


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


def tokens_in(cache: Any) -> int:
    """How many tokens a cache holds; 0 where it does not count them."""
    get_seq_length = getattr(cache, "get_seq_length", None)
    try:
        return 0 if get_seq_length is None else int(get_seq_length())
    except ValueError:  # no layer counts tokens (Mamba's)
        return 0


def mark_prompt_end(cache: Any) -> None:
    """Note on a cache that the last of its tokens was edited as the end of a prompt; copies of it carry the note."""
    if tokens_in(cache):
        cache._psr_prompt_end = tokens_in(cache)


def ends_in_prompt(cache: Any) -> bool:
    """Whether the last token of a cache is noted to have been edited as the end of a prompt."""
    end = getattr(cache, "_psr_prompt_end", None)
    return end is not None and end == tokens_in(cache)


def drop_last_token(cache: Any) -> bool:
    """Take the last token out of a cache, so that it is computed again; false for a kind of cache that keeps it."""
    layers = getattr(cache, "layers", ())
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    if not layers or not all(type(layer) in kinds for layer in layers):
        return False
    if any(layer.get_seq_length() >= getattr(layer, "sliding_window", float("inf")) for layer in layers):
        return False  # the oldest token in the window is gone
    cache.crop(-1)
    return True
