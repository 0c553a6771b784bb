"""Prompt Steering Replacement as an adapter type of Hugging Face PEFT; importing this registers it."""

from ._version import __version__
from .config import PSRConfig, PSRWarning
from .model import PSRModel
from .registration import register
from .tiny_chat import tiny_chat_path


register()

__all__ = ["PSRConfig", "PSRModel", "PSRWarning", "__version__", "tiny_chat_path"]
