"""Completions, drawn from a model here or at an OpenAI-compatible server."""
