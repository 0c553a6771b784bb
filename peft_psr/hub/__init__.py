"""Adapters as files and repositories: facts, model card, reading and combining, loading onto a model, pushing."""
