"""Kinds of adapters that can be measured, one a file, and their registry."""
