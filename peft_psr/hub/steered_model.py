"""A base model with saved adapters on it: which model, which arguments of its chat template, and both loaded."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from peft_psr.base_model.loading import ModelName, load_model, load_tokenizer, same_revision

from .adapter_config import read_adapter_config
from .saved_adapters import read_facts


def base_model_of(adapters: Mapping[str, str], model: str = "", revision: str | None = None) -> ModelName:
    """The base model to load: `model`, or else the one that the adapters' own configurations name.

    Args:
        adapters: {name: folder or Hub name}.
        model: Folder or Hub name, or empty.
        revision: Of the model; by default what the adapters say of a model of that name.

    Raises:
        ValueError: an adapter can't be found or is not PSR's; without `model`, an adapter names no base model, or they
            name different ones, which two revisions of one model are.
    """
    bases: dict[ModelName, list[str]] = {}
    for name, where in adapters.items():
        config = read_adapter_config(where)
        base = ModelName(config.base_model_name_or_path or "", config.revision)
        same = (each for each in bases if each.name == base.name and same_revision(each.revision, base.revision))
        bases.setdefault(next(same, base), []).append(name)
    of_model = [base for base in bases if not model or base.name == model]
    if model and (revision is not None or not of_model):
        return ModelName(model, revision)
    nameless = next((base for base in bases if not base.name), None)
    if nameless is not None and not model:
        raise ValueError(f"Adapter {bases[nameless][0]!r} does not say which model it is for; name it with --model.")
    if len(of_model) > 1:
        listed = "; ".join(f"{', '.join(names)} for {base}" for base, names in bases.items())
        raise ValueError(
            f"The adapters are for different models: {listed}. Load those of one model, or name with --model (and "
            "--revision) one that fits all."
        )
    return of_model[0] if revision is None else ModelName(of_model[0].name, revision)


def template_args_for(adapters: Mapping[str, str], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the chat template: those `given`, or else those that the adapters were trained with.

    Raises:
        ValueError: the adapters, {name: folder or Hub name}, were trained with different ones.
    """
    if given is not None:
        return dict(given)
    known = {name: facts.template_args for name, where in adapters.items() if (facts := read_facts(where)) is not None}
    different = {json.dumps(args, sort_keys=True): name for name, args in known.items()}
    if len(different) > 1:
        listed = "; ".join(f"{name} with {args}" for args, name in different.items())
        raise ValueError(
            f"The adapters were trained with different arguments of the chat template ({listed}). Choose with "
            "--template-args."
        )
    return next(iter(known.values()), {})


def load_with_adapters(base: ModelName | str, adapters: Mapping[str, str], **settings: Any) -> tuple[PeftModel, Any]:
    """The base model with all adapters on it, in eval mode, and its tokenizer.

    Args:
        base: A causal language model.
        adapters: {name: folder or Hub name}.
        **settings: Of `peft_psr.base_model.loading.load_tokenizer`.

    Raises:
        OSError: the model can't be found.
        ValueError: it is an adapter's name itself, or an adapter can't be found or does not fit.
    """
    name, revision = (base, None) if isinstance(base, str) else base
    processing_class = load_tokenizer(name, revision, **settings)
    device_map = "auto" if torch.cuda.is_available() else None
    trusted = settings.get("trust_remote_code", False)
    model: Any = load_model(name, revision, device_map=device_map, trust_remote_code=trusted)
    for name, where in adapters.items():
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(where, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, where, adapter_name=name)
        except SafetensorError as error:
            raise ValueError(f"The weights of adapter {name!r} ({where}) can't be read: {error}") from error
        except RuntimeError as error:  # PyTorch's word for weights of another shape
            raise ValueError(f"Adapter {name!r} ({where}) does not fit the model {base}: {error}") from error
    return model.eval(), processing_class
