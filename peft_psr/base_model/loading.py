"""Base models and their tokenizers by name: the one door that every command loads them through."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from peft_psr.prompts.chat_template import read_chat_template, set_chat_template
from peft_psr.text import read_text
from peft_psr.tiny_chat import EMBEDDED, tiny_chat_path

from .threads import choose_threads


class ModelName(NamedTuple):
    """All that decides a model's weights: folder or Hub name, and branch, tag or commit there (`None`: main)."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """For reading."""
        return self.name if self.revision is None else f"{self.name} at revision {self.revision}"


def same_revision(first: str | None, second: str | None) -> bool:
    """Whether two revisions of one model are the same, as far as their names tell."""
    return (first or "main") == (second or "main")


def model_path(name: str) -> str:
    """Where transformers finds a model: 'embedded' is in the package, `~` is one's own folder."""
    if name == EMBEDDED:
        return tiny_chat_path()
    own = os.path.expanduser(name)
    return own if os.path.isdir(own) else name


def load_tokenizer(
    name: str,
    revision: str | None = None,
    *,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Args:
        name: Folder or Hub name; 'embedded' is the model in the package.
        revision: Branch, tag or commit on the Hub.
        chat_template: File with a chat template in place of the tokenizer's own.
        template_args: Arguments of the chat template; see `peft_psr.prompts.chat_template`.
        trust_remote_code: Run code that comes with the model.

    Raises:
        OSError: it can't be had.
        ValueError: `name` is an adapter's, or the template and its arguments do not fit.
    """
    check_no_adapter(name, revision)
    processing_class = AutoTokenizer.from_pretrained(
        model_path(name), revision=revision, trust_remote_code=trust_remote_code
    )
    template = None if chat_template is None else read_chat_template(chat_template)
    set_chat_template(processing_class, template, template_args)
    return processing_class


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration; arguments and errors as of `load_model`, but that it may be an adapter's."""
    return AutoConfig.from_pretrained(model_path(name), revision=revision, trust_remote_code=trust_remote_code)


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a loaded model, in the revision its adapter or `load_model` says; `OSError` without one."""
    commit, adapter = getattr(model.config, "_commit_hash", None), getattr(model, "active_peft_config", None)
    return AutoTokenizer.from_pretrained(
        model.config.name_or_path, revision=commit or getattr(adapter, "revision", None)
    )


def load_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in eval mode; its configuration's `_commit_hash` says which commit of the Hub's it is.

    torch's threads are set to what the model's size asks for, unless the user has said; see `threads`.

    Args:
        name: Folder or Hub name; 'embedded' is the model in the package.
        revision: Branch, tag or commit on the Hub.
        dtype: Of its weights, by name; "auto" for that of the files.
        device_map: Where accelerate puts it; `None` for the CPU.
        trust_remote_code: Run code that comes with the model.

    Raises:
        OSError: it can't be had.
        ValueError: `name` is an adapter's.
    """
    check_no_adapter(name, revision)
    model = AutoModelForCausalLM.from_pretrained(
        model_path(name), revision=revision, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    model.config._commit_hash = commit_of(name, revision)
    choose_threads(model)
    return model.eval()


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a model on the Hub stands for, as far as it lies here; `None` for a folder."""
    path = model_path(name)
    file = None if os.path.isdir(path) else try_to_load_from_cache(path, "config.json", revision=revision or "main")
    return Path(file).parent.name if isinstance(file, str) else None


def check_no_adapter(name: str, revision: str | None = None) -> None:
    """Raise `ValueError` if `name` is an adapter's, which transformers would load on its base model without a word.

    What is trained on such a pair would be saved as an adapter of the base model alone.
    """
    path = model_path(name)
    found = find_adapter_config_file(path, revision=revision)
    if found is None:
        return
    try:
        config = json.loads(read_text(found))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{name} holds an {Path(found).name} that can't be read; take it away if this is a model.")
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind == "PSR":
        raise ValueError(
            f"{name} is a PSR adapter of {base}, not a model: name {base} as the model, and this as an adapter of it."
        )
    raise ValueError(
        f"{name} is a {kind} adapter of {base}, not a model, and an adapter made on both would be saved as one of "
        f"{base} alone. Merge the two first, then name the merged model's folder: "
        f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER), and the "
        "tokenizer into the same folder."
    )
