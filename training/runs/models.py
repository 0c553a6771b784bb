"""The models that recipes name, their tokenizers and configurations, loaded as the recipes say."""

import json
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_psr.base_model import loading

from .recipe_fields import ModelFields


def load_tokenizer(model: str, recipe: ModelFields) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model, with the recipe's chat template; raises as `peft_psr.base_model.loading`."""
    return _tokenizer(model, recipe.revision, json.dumps(recipe.tokenizer_settings))


@cache
def _tokenizer(model: str, revision: str | None, settings: str) -> PreTrainedTokenizerBase:
    return loading.load_tokenizer(model, revision, **json.loads(settings))


def load_config(model: str, recipe: ModelFields) -> Any:
    """The configuration of a recipe's model; raises `OSError` if it can't be had."""
    return loading.load_config(model, recipe.revision, recipe.trust_remote_code)


def load_model(model: str, recipe: ModelFields) -> Any:
    """A recipe's model, in eval mode; on the CPU where the recipe does not say where it goes.

    Raises as `peft_psr.base_model.loading.load_model`.
    """
    device_map = getattr(recipe, "device_map", None)
    return loading.load_model(
        model, recipe.revision, dtype=recipe.dtype, device_map=device_map, trust_remote_code=recipe.trust_remote_code
    )
