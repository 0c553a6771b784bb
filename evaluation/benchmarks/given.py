"""Adapters and triplets that a recipe is given: there, usable, and of the model as it is measured."""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress

from peft_psr.base_model.loading import same_revision
from peft_psr.hub.adapter_config import read_peft_config
from peft_psr.hub.saved_adapters import read_facts
from peft_psr.training import TripletCollator
from peft_psr.training.data.by_trait import Traits, check_origin, check_share, in_words, scan_traits, usable
from peft_psr.training.data.context import context_length
from peft_psr.training.runs.models import load_config, load_tokenizer

from .recipe import EvaluateRecipe


logger = logging.getLogger(__name__)


def check_adapter(name: str, place: str, recipe: EvaluateRecipe) -> None:
    """Checks an adapter by name and place; warns if it was trained with other arguments of the chat template.

    `ValueError` if it is not there, or of another revision of the model than the one that is measured.
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


def read_given(recipe: EvaluateRecipe, model: str, names: Sequence[str]) -> Traits:
    """The recipe's triplets by wanted trait, without those that can't be used, of which it warns.

    `FileNotFoundError` if there are none, `ValueError` if they are another model's, a trait is not there, or more of
    its triplets can't be used than can.
    """
    assert recipe.triplets is not None
    processing_class = load_tokenizer(model, recipe)
    limit = context_length(load_config(model, recipe))
    found = scan_traits(recipe.triplets, names)
    check_origin(found.traits, model, None, processing_class)
    collator = TripletCollator(processing_class, recipe.positions, recipe.train_alpha)
    kept: Traits = {}
    for name, rows in found.traits.items():
        fine, bad = usable(name, rows, found.places[name], collator, limit)
        left_out = [*found.left_out[name], *bad]
        check_share(name, len(fine), left_out)
        if left_out:
            logger.warning("triplets: %d of %r are left out: %s", len(left_out), name, in_words(left_out))
        kept[name] = [rows[i] for i in fine]
    return kept
