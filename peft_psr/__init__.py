"""Prompt Steering Replacement as an adapter type of Hugging Face PEFT; importing this registers it."""

from pathlib import Path

from ._version import __version__
from .config import PSRConfig, PSRWarning
from .model import PSRModel
from .registration import register
from .tiny_chat import tiny_chat_path


register()

# in a clone the packages `training` and `evaluation` lie beside this one; installed, they lie in it
_clone = Path(__file__).parent.parent
if (_clone / "pyproject.toml").is_file() and (_clone / "training" / "trainer.py").is_file():
    __path__.append(str(_clone))

__all__ = ["PSRConfig", "PSRModel", "PSRWarning", "__version__", "tiny_chat_path"]
