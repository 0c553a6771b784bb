"""What a training run leaves for each trait: an adapter folder with its model card, summary and recipe."""

import shutil
from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from peft_psr.base_model.loading import EMBEDDED
from peft_psr.files import write_json, write_whole
from peft_psr.hub.facts import AdapterFacts, package_versions
from peft_psr.hub.model_card import write_model_card
from peft_psr.prompts.conversations import last_text
from peft_psr.prompts.messages import content_text
from peft_psr.training.data.triplets import Triplet
from peft_psr.training.trainer.trainer import PSRTrainer

from .recipe import TrainRecipe


SUMMARY, RECIPE = "summary.json", "recipe.yaml"


def write_adapter_folder(
    folder: Path,
    trainer: PSRTrainer,
    adapter: str,
    saved: Path,
    recipe: TrainRecipe,
    trait: str,
    triplets: Sequence[Triplet],
    more: dict[str, Any],
) -> None:
    """Writes the new folder of one trait: adapter, README.md, psr_facts.json, recipe.yaml and summary.json.

    `saved` is where `trainer.save_model` has put the weights of `adapter` after its training on `triplets`; `more` is
    what
    else the summary is to say.
    """
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(saved / ("" if adapter == "default" else adapter) / name, folder / name)
    write_model_card(folder, _facts(trainer, recipe, trait, triplets))
    used = recipe.model_dump(mode="json") | {"traits": [trait]}
    write_whole(folder / RECIPE, yaml.safe_dump(used, sort_keys=False, allow_unicode=True))
    assert trainer.summary is not None
    losses: dict[str, Any] = {"loss": _loss(trainer, adapter)}
    if trainer.eval_dataset is not None:
        losses["eval_loss"] = _eval_loss(trainer, f"eval_loss/{adapter}" if trainer.several else "eval_loss")
    summary = {"trait": trait, "triplets": len(triplets), **more, **losses, **trainer.summary.to_json()}
    write_json(folder / SUMMARY, summary)


def _facts(trainer: PSRTrainer, recipe: TrainRecipe, trait: str, triplets: Sequence[Triplet]) -> AdapterFacts:
    instructions = dict.fromkeys(_instruction(triplet) for triplet in triplets)
    toy = "the toy chat model inside peft-psr (1.35 M parameters)"
    facts = training_facts(
        trainer,
        trait=trait,
        instructions=tuple(text for text in instructions if text)[:2],
        question=last_text(triplets[0]["prompt"]),
        template_args=recipe.template_args or {},
        base_model=toy if recipe.model == EMBEDDED else None,
        triplets=len(triplets),
    )
    return replace(facts, objective=f"{facts.objective}; start: {recipe.start}")


def training_facts(trainer: PSRTrainer, **known: Any) -> AdapterFacts:
    """Facts for a model card that a run, its `trainer`, knows: objective, triplets, seed, base revision, versions.

    `known` are further fields of `AdapterFacts`, such as `trait`; they win.
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


def _instruction(triplet: Triplet) -> str | None:
    """The system turn that the steered prompt has and the plain one lacks."""
    first = triplet["steered_prompt"][0]
    if isinstance(first, str) or first["role"] != "system" or first in triplet["prompt"]:
        return None
    return content_text(first)


def _loss(trainer: PSRTrainer, adapter: str) -> float:
    """The mean loss over the last epoch, weighted as it was trained."""
    summary, args = trainer.summary, trainer.args
    assert summary is not None
    if trainer.several:
        return summary.loss_by_adapter[adapter]
    weights = args.objective_weights | args.penalty_weights
    return sum(weights[name] * loss for name, loss in summary.losses.items())


def _eval_loss(trainer: PSRTrainer, name: str) -> float | None:
    """The held-out loss of the weights that are saved."""
    if trainer.state.best_metric is not None and trainer.args.load_best_model_at_end:
        return trainer.state.best_metric
    losses = [entry[name] for entry in trainer.state.log_history if name in entry]
    return losses[-1] if losses else None
