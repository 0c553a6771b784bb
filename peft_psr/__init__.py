"""Prompt Steering Replacement as an adapter type of Hugging Face PEFT; importing this registers it."""

from pathlib import Path
from typing import TYPE_CHECKING

from ._lazy import lazily
from ._moved import keep_old_paths
from ._version import __version__
from .registration import register_with_peft


if TYPE_CHECKING:
    from .config import PSRConfig, PSRWarning
    from .model import PSRModel
    from .tiny_chat import tiny_chat_path

# in a clone the packages `training`, `evaluation` and `serving` lie beside this one; installed, they lie in it
_clone = Path(__file__).parent.parent
if (_clone / "pyproject.toml").is_file() and (_clone / "training" / "trainer").is_dir():
    __path__.append(str(_clone))

keep_old_paths()
register_with_peft()

__getattr__, __dir__ = lazily(
    __name__,
    {
        "peft_psr.config": "PSRConfig PSRWarning",
        "peft_psr.model": "PSRModel",
        "peft_psr.tiny_chat": "tiny_chat_path",
    },
)

__all__ = ["PSRConfig", "PSRModel", "PSRWarning", "__version__", "tiny_chat_path"]
