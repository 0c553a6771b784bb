"""Adapters on the Hub, one repository each: checked first, then uploaded in a single commit, which is all or nothing.

PEFT's own `push_to_hub` uploads every adapter of a model and writes an empty card; this uploads one, with its own.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_psr.config import PSRConfig
from peft_psr.files import read_json

from .adapter_config import is_hub_name, read_folder_config
from .facts import FACTS_NAME, AdapterFacts
from .model_card import CARD_NAME, FIGURE_NAME, is_own_card, write_model_card


FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME, FACTS_NAME, FIGURE_NAME)
"""All that is ever uploaded: no checkpoints, no optimiser states, nothing else that lies in the folder."""

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""httpx's, of connections that fail as well: the Hub's client uses httpx, and httpx2 from its version 2 on."""


@dataclass(frozen=True)
class Push:
    """An upload, done or (in a dry run) ready to be done.

    Attributes:
        repo_id: Full name of the repository.
        url: Where it is.
        creates: Whether the repository is new.
        files: {name: bytes} of what is uploaded.
        removes: Files of an earlier upload that this one has no counterpart to.
        commit: Hash of the commit; `None` in a dry run.
    """

    repo_id: str
    url: str
    creates: bool
    files: dict[str, int]
    removes: tuple[str, ...] = ()
    commit: str | None = None


def push_adapter(
    source: str | os.PathLike | PeftModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    facts: AdapterFacts | None = None,
    private: bool | None = None,
    update: bool = False,
    commit_message: str = "Upload PSR adapter",
    dry_run: bool = False,
    api: HfApi | None = None,
) -> Push:
    """Upload one PSR adapter with a model card written for it. Everything is checked before anything is uploaded.

    A README.md that you wrote or changed yourself is uploaded as it is; PEFT's empty card is replaced.

    Args:
        source: An adapter folder, or a model with PSR adapters, of which just one is uploaded.
        repo_id: "namespace/name", or "name" for your own namespace.
        adapter_name: Which of a model's adapters; may be left out if it has just one.
        base_model: Name of the base model on the Hub, where the adapter's configuration holds a folder or nothing.
        facts: For the card; by default what `psr_facts.json` in the folder holds.
        private: Whether a new repository is private; `None` for the Hub's default.
        update: Allow a repository that holds a PSR adapter of the same base model already.
        commit_message: For the repository's history.
        dry_run: Check everything, on the Hub too, but create and upload nothing.
        api: The Hub's address and the token; by default `HF_ENDPOINT` and that of `hf auth login` or `HF_TOKEN`.

    Returns:
        What was uploaded, and where.

    Raises:
        FileNotFoundError: the folder is no adapter folder, or its weights are not safetensors.
        ValueError: another kind of adapter, unreadable weights, no name for the base model or two different ones,
            a repository that holds something else, or metadata that the Hub does not accept.
        PermissionError: no token, or one that may not do this.
        FileExistsError: the repository holds an adapter and `update` is false.
        ConnectionError: the Hub could not be reached, or the connection broke.
    """
    api = api or HfApi()
    validate_repo_id(repo_id)
    with TemporaryDirectory() as scratch:
        if isinstance(source, PeftModel):
            folder = _save_one(source, adapter_name, Path(scratch, "saved"))
        elif adapter_name is not None:
            raise ValueError(f"adapter_name={adapter_name!r} is for a model; a folder holds one adapter.")
        else:
            folder = Path(source)
        config = read_folder_config(folder)
        _check_weights(folder)
        base_model = _base_model(config, base_model)
        with _clear_errors(api, repo_id):
            user = api.whoami()["name"]
            repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
            existing = _check_repository(api, repo_id, base_model, private, update)
        staged = Path(scratch, "staged")
        _stage(folder, staged, repo_id, config.base_model_name_or_path, base_model, facts)
        files = {name: (staged / name).stat().st_size for name in FILES if (staged / name).is_file()}
        present = {entry.rfilename for entry in (existing.siblings or [] if existing else [])}
        removes = tuple(name for name in FILES if name in present and name not in files)
        push = Push(repo_id, f"{api.endpoint}/{repo_id}", existing is None, files, removes)
        return push if dry_run else _upload(api, push, staged, existing, private, commit_message)


def _save_one(model: PeftModel, adapter_name: str | None, folder: Path) -> Path:
    """Save one adapter of a model; its folder."""
    ours = sorted(name for name, config in model.peft_config.items() if isinstance(config, PSRConfig))
    if adapter_name is None and len(ours) == 1:
        adapter_name = ours[0]
    if adapter_name not in ours:
        raise ValueError(
            f"Name one PSR adapter of the model as adapter_name, got {adapter_name!r}; there are: "
            f"{', '.join(ours) or 'none'}."
        )
    model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    return folder if adapter_name == "default" else folder / adapter_name


def _check_weights(folder: Path) -> None:
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        pickled = f" It has {WEIGHTS_NAME}, a pickle: load it and save it again."
        has_pickle = (folder / WEIGHTS_NAME).is_file()
        raise FileNotFoundError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}.{pickled if has_pickle else ''}")
    try:
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{weights} can't be read ({error}); save the adapter again.") from error
    if not any(".psr_unit." in name for name in names):
        raise ValueError(f"{weights} holds no weights of a PSR adapter; save the adapter again.")


def _base_model(config: PSRConfig, base_model: str | None) -> str:
    """The base model's name on the Hub, from the configuration or as given."""
    saved = config.base_model_name_or_path
    if base_model is not None:
        validate_repo_id(base_model)
        if is_hub_name(saved) and saved != base_model:
            raise ValueError(
                f"The adapter was trained on {saved!r}, not on {base_model!r}; leave base_model (--base-model) out."
            )
        return base_model
    if not is_hub_name(saved):
        raise ValueError(
            f"The adapter's configuration gives {saved or 'nothing'!r} as its base model, which means nothing to "
            "others. Say what it is called on the Hub: base_model=NAMESPACE/NAME (--base-model)."
        )
    return str(saved)


def _stage(
    folder: Path, staged: Path, repo_id: str, saved_base: str | None, base_model: str, facts: AdapterFacts | None
) -> None:
    """Put what is to be uploaded into a folder of its own; `folder` stays as it is."""
    staged.mkdir()
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
    settings = read_json(folder / CONFIG_NAME) | {"base_model_name_or_path": base_model}
    (staged / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    if facts is not None:
        facts.save(staged)
    card = staged / CARD_NAME
    if not card.is_file() or not is_own_card(card):
        write_model_card(staged, name=repo_id)
    for name in (CONFIG_NAME, CARD_NAME, FACTS_NAME):
        text = (staged / name).read_text(encoding="utf-8") if (staged / name).is_file() else ""
        if saved_base and saved_base != base_model and saved_base in text:
            raise ValueError(
                f"{folder / name} holds a path of this machine, {saved_base!r}; take it out before sharing."
            )


def _check_repository(
    api: HfApi, repo_id: str, base_model: str, private: bool | None, update: bool
) -> ModelInfo | None:
    """What is on the Hub under this name; `None` if nothing is, an error if it is in the way."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    present = {entry.rfilename for entry in info.siblings or []}
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, so it would not be private. Make it private on the Hub first."
        )
    if not present - {".gitattributes", CARD_NAME}:
        return info
    if CONFIG_NAME not in present:
        raise ValueError(
            f"{repo_id} exists and holds no adapter ({', '.join(sorted(present)[:5])}). Choose another name."
        )
    there = read_json(api.hf_hub_download(repo_id, CONFIG_NAME, revision=info.sha))
    if there.get("peft_type") != "PSR" or there.get("base_model_name_or_path") != base_model:
        raise ValueError(
            f"{repo_id} holds a {there.get('peft_type')} adapter of {there.get('base_model_name_or_path')!r}, and "
            f"this is a PSR adapter of {base_model!r}. Choose another name."
        )
    if not update:
        raise FileExistsError(
            f"{repo_id} holds an adapter already. Choose another name, or replace it with update=True (--update)."
        )
    return info


def _upload(
    api: HfApi, push: Push, staged: Path, existing: ModelInfo | None, private: bool | None, commit_message: str
) -> Push:
    operations: list[Any] = [CommitOperationAdd(name, staged / name) for name in push.files]
    operations += [CommitOperationDelete(name) for name in push.removes]
    with _clear_errors(api, push.repo_id):
        if existing is None:
            api.create_repo(push.repo_id, private=private)
    with _clear_errors(api, push.repo_id, sending=True):
        commit = api.create_commit(
            push.repo_id, operations, commit_message=commit_message, parent_commit=existing.sha if existing else None
        )
    return replace(push, commit=commit.oid)


@contextmanager
def _clear_errors(api: HfApi, repo_id: str, sending: bool = False) -> Iterator[None]:
    """Turn what the Hub's client raises into errors that say what to do; tokens are never part of a message."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            "Uploading needs a Hugging Face token and there is none: run `hf auth login`, or set HF_TOKEN."
        ) from error
    except (HTTPError, RuntimeError) as error:  # RuntimeError: how the client wraps a failed upload of large files
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise PermissionError(
                f"{api.endpoint} does not let this token write to {repo_id} ({status}). Run `hf auth login` with a "
                "token that may write there, or set HF_TOKEN to one."
            ) from error
        if status == 409:
            raise FileExistsError(f"{repo_id} exists already; choose another name.") from error
        if status == 412:
            raise FileExistsError(f"Somebody else changed {repo_id} meanwhile; run this again.") from error
        after = (
            "A commit is all or nothing, so the repository is as it was or complete: run this again, with update=True "
            "(--update) if it then says that the adapter is there."
            if sending
            else "Nothing was uploaded."
        )
        raise ConnectionError(f"{api.endpoint} did not answer as it should: {error}. {after}") from error
