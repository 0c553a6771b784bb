"""Prompt Steering Replacement as an adapter type of Hugging Face PEFT; importing this registers it."""

from pathlib import Path

from ._moved import keep_old_paths
from ._version import __version__
from .config import PSRConfig, PSRWarning
from .model import PSRModel
from .registration import register
from .tiny_chat import tiny_chat_path


keep_old_paths()
register()

# in a clone the packages `training`, `evaluation` and `serving` lie beside this one; installed, they lie in it
_clone = Path(__file__).parent.parent
if (_clone / "pyproject.toml").is_file() and (_clone / "training" / "trainer").is_dir():
    __path__.append(str(_clone))

__all__ = ["PSRConfig", "PSRModel", "PSRWarning", "__version__", "tiny_chat_path"]
