"""The models that recipes name, their tokenizers and configurations, loaded as the recipes say."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from peft_psr.base_model import loading
from peft_psr.training.runs.train.recipe import TrainRecipe
from peft_psr.training.runs.triplets.recipe import DrawFields


def load_tokenizer(model: str, recipe: DrawFields | TrainRecipe) -> Any:
    """The tokenizer of a recipe's model, with the chat template that the recipe gives it.

    Raises:
        OSError: it can't be had.
        ValueError: as `peft_psr.base_model.loading.load_tokenizer`.
    """
    return _tokenizer(model, recipe.revision, json.dumps(recipe.tokenizer_settings))


@cache
def _tokenizer(model: str, revision: str | None, settings: str) -> Any:
    return loading.load_tokenizer(model, revision, **json.loads(settings))


def load_config(model: str, recipe: DrawFields | TrainRecipe) -> Any:
    """The configuration of a recipe's model.

    Raises:
        OSError: it can't be had.
    """
    return loading.load_config(model, recipe.revision, recipe.trust_remote_code)


def load_model(model: str, recipe: DrawFields | TrainRecipe) -> Any:
    """A recipe's model, in eval mode; on the CPU where the recipe does not say where it goes.

    Raises:
        OSError: it can't be had.
        ValueError: as `peft_psr.base_model.loading.load_model`.
    """
    device_map = recipe.device_map if isinstance(recipe, DrawFields) else None
    return loading.load_model(
        model, recipe.revision, dtype=recipe.dtype, device_map=device_map, trust_remote_code=recipe.trust_remote_code
    )
