"""Adapters combined into one: exactly, and then with fewer ranks."""
