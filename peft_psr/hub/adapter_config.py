"""The configuration of a saved adapter, read from its folder or from the Hub."""

import json
import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.utils import CONFIG_NAME

from peft_psr.config import PSRConfig


def read_folder_config(folder: Path) -> PSRConfig:
    """The configuration of the adapter in a folder.

    Raises:
        FileNotFoundError: the folder has no `adapter_config.json`.
        ValueError: it can't be read, or is another kind of adapter's.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} is no adapter folder (it has no {CONFIG_NAME}). Name the one that `save_pretrained` wrote; "
            "adapters with a name of their own are in a subfolder of that name."
        )
    return read_adapter_config(str(folder))


def read_adapter_config(source: str) -> PSRConfig:
    """The configuration of a PSR adapter; as `read_peft_config`, with `ValueError` for another kind."""
    config = read_peft_config(source)
    if not isinstance(config, PSRConfig):
        kind = getattr(config.peft_type, "value", None)
        raise ValueError(f"{source} holds an adapter of type {kind!r}, not 'PSR'.")
    return config


def read_peft_config(source: str) -> PeftConfig:
    """The configuration of a saved adapter of any kind, in a folder or on the Hub.

    Raises:
        OSError: the Hub can't be reached.
        ValueError: there is no adapter, or its configuration can't be read.
    """
    if not os.path.isdir(source) and not is_hub_name(source):
        raise ValueError(f"No adapter folder {source!r}, and no name on the Hub either.")
    try:
        return PeftConfig.from_pretrained(source)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The adapter_config.json of {source} is no adapter's configuration: {error}. Save the adapter again."
        ) from error


def is_hub_name(name: str | None) -> bool:
    """Whether `name` can only mean a model on the Hub: well formed, and no folder here."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
