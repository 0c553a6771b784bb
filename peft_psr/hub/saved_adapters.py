"""Adapters as files: read without their base model, and combined into a new adapter folder."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from peft_psr.base_model.fit import KEY_OF_UNIT, KEY_PREFIX
from peft_psr.combination.concatenation import check_weights, combine, numbered_alike
from peft_psr.config import PSRConfig
from peft_psr.files import check_new_folder
from peft_psr.unit import PSRUnit

from .adapter_config import read_adapter_config
from .facts import FACTS_NAME, AdapterFacts, Part, package_versions, shared_template_args
from .model_card import write_model_card


@dataclass(frozen=True)
class SavedAdapter:
    """A PSR adapter as its files have it.

    Attributes:
        name: The Hub's name, or the folder's own.
        config: Its configuration.
        units: {name of an edited module: its weights}.
        facts: What else is known about it.
        others: Keys of what else the file holds: embeddings that were resized, `modules_to_save`.
    """

    name: str
    config: PSRConfig
    units: dict[str, PSRUnit]
    facts: AdapterFacts
    others: tuple[str, ...] = ()


def read_adapter(source: str | os.PathLike) -> SavedAdapter:
    """Read an adapter, from a folder or the Hub, without its base model.

    Raises:
        OSError: the Hub can't be reached.
        ValueError: there is no adapter, it is of another kind, or its files can't be read.
    """
    source = str(source)
    config = read_adapter_config(source)
    try:
        units, others = _read_units(source, config)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of {source} can't be read or do not fit its configuration: {error}.") from error
    if not units:
        raise ValueError(f"{source} holds no weights of a PSR adapter.")
    name = Path(source).resolve().name if os.path.isdir(source) else source
    return SavedAdapter(name, config, units, read_facts(source) or AdapterFacts(), others)


def _read_units(source: str, config: PSRConfig) -> tuple[dict[str, PSRUnit], tuple[str, ...]]:
    """The weights of each edited module, and the keys of what else there is."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    others = []
    for key, tensor in load_peft_weights(source, device="cpu").items():
        module, found, parameter = key.removeprefix(KEY_PREFIX).partition(KEY_OF_UNIT)
        if found:
            grouped.setdefault(module, {})[parameter] = tensor
        else:
            others.append(module)
    units = {}
    for module, state in grouped.items():
        rank, width = state["direction"].shape
        units[module] = PSRUnit(width, rank, config.gate, init_weights=True)
        units[module].load_state_dict(state)
    return units, tuple(sorted(others))


def read_facts(source: str) -> AdapterFacts | None:
    """What is known about an adapter in a folder or on the Hub, or `None` if it has no facts.

    Raises:
        OSError: the Hub can't be reached.
        ValueError: its facts can't be read.
    """
    if os.path.isdir(source):
        return AdapterFacts.load(source)
    try:
        return AdapterFacts.load(Path(hf_hub_download(source, FACTS_NAME)).parent)
    except EntryNotFoundError:
        return None


def compose_adapters(
    sources: Sequence[str | os.PathLike],
    weights: Sequence[float],
    output: str | os.PathLike,
    *,
    base_model: str | None = None,
    svd_rank: int | None = None,
    model: PreTrainedModel | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    dry_run: bool = False,
) -> PSRConfig:
    """Combine saved adapters into a new adapter folder; without loading the base model unless the rank is to be cut.

    At strength 1 the result does what `add_weighted_adapter(..., combination_type="cat")` makes of them: each at its
    own strength times its weight, on every layer that any of them edits. With `svd_rank` it is then cut to that rank
    as `combination_type="svd"` does; what that costs by layer is written to the facts (`rank_cut`).

    Args:
        sources: Adapter folders, or names on the Hub.
        weights: One finite number each; a negative one steers away from the trait.
        output: A folder that does not exist yet, or an empty one; it is there whole or not at all.
        base_model: The base model's name, where the adapters call the same model by different names.
        svd_rank: The rank to keep, 1 or more; needs `model` and `samples`.
        model: The loaded base model; left as it was.
        samples: Arguments of forward calls on text that the combination is to steer.
        dry_run: Read and check everything, write nothing.

    Returns:
        The combination's configuration.

    Raises:
        FileExistsError, NotADirectoryError: there is something at `output`.
        OSError: the Hub can't be reached.
        ValueError: weights and adapters do not match, an adapter is none or of another kind, or they can't be one:
            different base models, positions or widths, weights beside the edits; or `svd_rank` without model or
            samples.
    """
    output = Path(output)
    if svd_rank is not None and (model is None or not samples):
        raise ValueError("svd_rank needs the base model and samples: a rank is cut by a fit to what the edit does.")
    check_new_folder(output)
    weights = check_weights(sources, weights)
    adapters = [read_adapter(source) for source in sources]
    config, states = _combine(adapters, weights, base_model)
    if dry_run:
        return config
    weighted = zip(adapters, weights, strict=True)
    parts = tuple(Part(adapter.name, weight, adapter.facts.trait) for adapter, weight in weighted)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch, output.name)
        folder.mkdir()
        tensors = {
            f"{KEY_PREFIX}{module}{KEY_OF_UNIT}{name}": tensor
            for module, state in states.items()
            for name, tensor in state.items()
        }
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        errors: dict[str, float] = {}
        if svd_rank is not None:
            folder, config, errors = _cut(folder, model, svd_rank, samples, Path(scratch, "cut"))
        facts = AdapterFacts(
            parts=parts,
            rank_cut=errors,
            versions=package_versions(),
            template_args=shared_template_args(adapter.facts for adapter in adapters),
        )
        write_model_card(folder, facts)
        folder.replace(output)
    return config


def _cut(exact: Path, model: Any, rank: int, samples: Any, scratch: Path) -> tuple[Path, PSRConfig, dict[str, float]]:
    """The folder of `exact` with its rank cut, its configuration, and the error by layer."""
    steered: Any = PeftModel.from_pretrained(model, exact, adapter_name="exact").eval()
    try:
        errors = steered.add_weighted_adapter(
            ["exact"], [1.0], "cut", combination_type="svd", svd_rank=rank, samples=samples
        )
        steered.save_pretrained(str(scratch), selected_adapters=["cut"])
        return scratch / "cut", steered.peft_config["cut"], {str(layer): error for layer, error in errors.items()}
    finally:
        steered.unload()


def _combine(
    adapters: Sequence[SavedAdapter], weights: Sequence[float], base_model: str | None
) -> tuple[PSRConfig, dict[str, dict[str, torch.Tensor]]]:
    """As `concatenation.combine`, of adapters that may be of different models."""
    configs = [adapter.config for adapter in adapters]
    bases = [(config.base_model_name_or_path, config.revision or "main") for config in configs]
    if base_model is None and len(set(bases)) > 1:
        named = zip(adapters, bases, strict=True)
        listed = "; ".join(f"{adapter.name}: {base}, revision {revision}" for adapter, (base, revision) in named)
        raise ValueError(
            f"The adapters name different base models ({listed}). If they are one and the same, give its name as "
            "base_model (--base-model)."
        )
    for adapter in adapters:
        if adapter.others and not adapter.config.modules_to_save:  # else `combine` refuses them
            raise ValueError(
                f"{adapter.name} holds more than edits: {', '.join(adapter.others)}. A combination would lose it. If "
                "these are embeddings of a model with added tokens, save that model to be the base, and the adapter "
                "with `save_embedding_layers=False`."
            )
    widths = {unit.direction.shape[1] for adapter in adapters for unit in adapter.units.values()}
    if numbered_alike(configs) and len(widths) > 1:
        raise ValueError(f"The adapters fit models of different widths {sorted(widths)}, so not one and the same.")
    modules = sorted({module for adapter in adapters for module in adapter.units})
    units = {module: [adapter.units.get(module) for adapter in adapters] for module in modules}
    config, states = combine(configs, weights, units)
    config.inference_mode = True
    if base_model is not None:
        revisions = {each.revision for each in configs if each.base_model_name_or_path == base_model}
        config.base_model_name_or_path = base_model
        config.revision = revisions.pop() if len(revisions) == 1 else None
    return config, states
