"""Starts made from the data, without a gradient step."""
