"""What a finished training run says about its adapter, for the adapter's model card."""

from collections.abc import Sized
from typing import Any

from peft_psr.hub.facts import AdapterFacts, package_versions
from peft_psr.training.trainer.trainer import PSRTrainer


def training_facts(trainer: PSRTrainer, **known: Any) -> AdapterFacts:
    """Facts that the run itself knows: objective, number of triplets, seed, the base model's revision, versions.

    Args:
        trainer: After (or before) its training.
        **known: Further fields of `AdapterFacts`, such as `trait`; they win.

    Returns:
        Facts for `write_model_card` and `push_adapter`.
    """
    weights, triplets = trainer.args.objective_weights, trainer.train_dataset
    parts = [name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()]
    run = {
        "objective": " + ".join(parts),
        "triplets": len(triplets) if isinstance(triplets, Sized) else None,
        "seed": trainer.args.seed,
        "base_model_revision": getattr(getattr(trainer.model, "config", None), "_commit_hash", None),
        "versions": package_versions(),
    }
    return AdapterFacts(**{**run, **known})
