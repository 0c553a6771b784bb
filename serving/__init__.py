"""Talking to a model with adapters."""
