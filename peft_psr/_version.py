"""The package's version, kept apart so that building it needs no import of torch."""

__version__ = "0.2.0"
