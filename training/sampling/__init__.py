"""Completions, drawn from a model here or at an OpenAI-compatible server."""

from typing import TYPE_CHECKING

from peft_psr._lazy import lazily


if TYPE_CHECKING:
    from .local import LocalSampler, sample_completions

__getattr__, __dir__ = lazily(__name__, {f"{__name__}.local": "LocalSampler sample_completions"})

__all__ = ["LocalSampler", "sample_completions"]
