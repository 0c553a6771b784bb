"""A toy chat model with its own grammar, on which everything in this project runs offline."""

from pathlib import Path

from .grammar import prompt_messages, sample_answer, sample_conversation
from .topics import TOPICS, Question, questions
from .traits import TRAITS, instructions, neutral_instructions


EMBEDDED = "embedded"
"""As a model's name: the one in the package."""


def tiny_chat_path() -> str:
    """The folder of the embedded chat model, for `from_pretrained`."""
    return str(Path(__file__).parent / "model")


__all__ = [
    "EMBEDDED",
    "TOPICS",
    "TRAITS",
    "Question",
    "instructions",
    "neutral_instructions",
    "prompt_messages",
    "questions",
    "sample_answer",
    "sample_conversation",
    "tiny_chat_path",
]
