"""Triplets that a recipe gives to train on: those that can be used, and of the model that is measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from peft_psr.training import TripletCollator
from peft_psr.training.data.by_trait import Traits, check_origin, check_share, in_words, scan_traits, usable
from peft_psr.training.data.context import context_length
from peft_psr.training.runs.models import load_config, load_tokenizer

from .recipe import EvaluateRecipe


logger = logging.getLogger(__name__)


def read_given(recipe: EvaluateRecipe, model: str, names: Sequence[str]) -> Traits:
    """The recipe's triplets by wanted trait, without those that can't be used, of which it warns.

    Raises:
        FileNotFoundError: there are no triplets there.
        ValueError: they are another model's, a trait is not there, or more of its triplets can't be used than can.
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
