"""Completions, drawn from a model here or at an OpenAI-compatible server."""

from .local import LocalSampler, sample_completions


__all__ = ["LocalSampler", "sample_completions"]
