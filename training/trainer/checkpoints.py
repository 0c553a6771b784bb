"""Adapters read back from a checkpoint of the Trainer."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict


def load_adapters(model: PeftModel, names: Sequence[str], folder: str) -> None:
    """Set adapters' weights to those of a checkpoint, from where PEFT's `save_pretrained` puts them.

    Args:
        model: The model that is trained.
        names: The adapters that are trained.
        folder: The checkpoint.

    Raises:
        FileNotFoundError: the checkpoint lacks one of them.
    """
    for name in names:
        path = Path(folder) if name == "default" else Path(folder) / name
        if not (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of this run: {path} holds no adapter.")
        set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"), adapter_name=name)
