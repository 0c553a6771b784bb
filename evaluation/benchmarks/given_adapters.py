"""Adapters that a recipe is given: there, and of the model as it is measured."""

from __future__ import annotations

import json
import logging
from contextlib import suppress

from peft_psr.base_model.loading import same_revision
from peft_psr.hub.adapter_config import read_peft_config
from peft_psr.hub.saved_adapters import read_facts

from .recipe import EvaluateRecipe


logger = logging.getLogger(__name__)


def check_adapter(name: str, place: str, recipe: EvaluateRecipe) -> None:
    """Checks an adapter by name and place; warns if it was trained with other arguments of the chat template.

    Raises:
        ValueError: it is not there, or of another revision of the model than the one that is measured.
    """
    try:
        config = read_peft_config(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"adapters: {name!r} is not to be had from {place!r}: {error}") from error
    revision, base = recipe.revision, config.base_model_name_or_path
    if base in recipe.models and not same_revision(config.revision, revision):
        raise ValueError(
            f"adapters: {name!r} is of {base} at revision {config.revision or 'main'}, and what is measured is "
            f"revision {revision or 'main'}. Say --revision {config.revision or 'main'}."
        )
    facts, args = None, recipe.template_args or {}
    with suppress(OSError, ValueError):  # it can be measured without
        facts = read_facts(place)
    if facts is not None and facts.template_args != args:
        logger.warning(
            "Adapter %s was trained with other arguments of the chat template (%s) than it is measured with (%s), so "
            "on other prompts; --template-args sets them.",
            name,
            json.dumps(facts.template_args),
            json.dumps(args),
        )
