"""A run of `psr train`: one adapter a trait, in a folder that can be left at any moment and gone on with.

Each adapter appears in its folder when it is finished, whole. Until then its checkpoints are in `checkpoints/`; a
later start goes on from the last one that training had not come to its end with, and the adapter is that of a run that
was never stopped, up to rounding.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState

from peft_psr.files import digest, read_json, write_json
from peft_psr.training.data.by_trait import (
    LeftOut,
    as_json,
    check_origin,
    check_share,
    folder_name,
    hold_out,
    in_words,
    scan_traits,
    usable,
)
from peft_psr.training.data.collator import TripletCollator
from peft_psr.training.data.context import context_length
from peft_psr.training.data.dataset import EncodedTriplets
from peft_psr.training.data.triplets import Triplet
from peft_psr.training.runs.models import load_config, load_model, load_tokenizer
from peft_psr.training.runs.run_folder import begun_run, check_same_recipe, locked

from .assembly import add_adapters, last_checkpoint, make_arguments, make_config, make_trainer, start_from_data
from .recipe import TrainRecipe
from .results import SUMMARY, write_adapter_folder


logger = logging.getLogger(__name__)

STATE, CHECKPOINTS, LOGS = "run.json", "checkpoints", "logs"
SAVED, STAGED, FINISHED = "saved", "staged", "finished"
"""Beside the checkpoints: the weights at the end, adapter folders in the making, and those that are whole."""
TOGETHER = "together"
"""What a parallel run is called where one trait's would have the trait's name."""


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do for one trait."""

    trait: str  # its name
    train: int  # how many triplets to train on
    held_out: int  # how many for the held-out loss
    steps: int  # optimiser steps at most
    finished: bool  # its adapter is there already
    left_out: list[LeftOut]  # triplets that can't be used


class TrainRun:
    """One recipe's run in its folder.

    The folder holds a subfolder for each trait (see `write_adapter_folder`), `run.json`, which says what the run was
    begun with, `logs/` for TensorBoard if that is asked for, and while the run lasts `checkpoints/`.

    Args:
        folder: A new one, or one that a run of the same recipe has left.
        recipe: What to do.

    Raises:
        FileNotFoundError: there are no triplets there.
        ValueError: a trait is not there, or nothing would be left to train on.
    """

    def __init__(self, folder: Path, recipe: TrainRecipe) -> None:
        self.folder, self.recipe = Path(folder), recipe
        self._files = scan_traits(recipe.triplets, recipe.traits)
        self.triplets = self._files.traits
        self.left_out = self._files.left_out
        sides = {name: hold_out(rows, recipe.eval_share, recipe.seed, name) for name, rows in self.triplets.items()}
        self.train: dict[str, Sequence[Triplet]] = {name: train for name, (train, _) in sides.items()}
        self.held_out: dict[str, Sequence[Triplet]] = {name: held_out for name, (_, held_out) in sides.items()}
        for name, rows in self.triplets.items():
            check_share(name, len(rows), self.left_out[name])
        self._base: Any = None

    def check(self) -> list[TrainPlan]:
        """Checks all that can be known before the base model is loaded; writes nothing. Returns a plan for each trait.

        Raises:
            FileExistsError: the folder holds something else.
            ImportError: TensorBoard is asked for and missing.
            OSError: the model's tokenizer can't be had.
            ValueError: the folder's run has another recipe or other triplets; a setting is wrong; nothing of a trait
                can be used, or less than half; or a triplet was drawn from another model.
        """
        self._check_folder()
        recipe = self.recipe
        if recipe.report_to == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
            raise ImportError("report_to: tensorboard needs a package that is missing: pip install tensorboard")
        if os.environ.get("ACCELERATE_USE_FSDP"):
            raise ValueError(
                "psr train runs in one process or under DDP, where each holds the whole model. For FSDP call "
                "PSRTrainer from a script; see docs/distributed.md."
            )
        make_config(recipe)
        arguments = make_arguments(recipe, self.folder)
        if recipe.parallel and arguments.world_size > 1:
            raise ValueError("parallel trains the traits in one process; leave it out under accelerate launch.")
        tokenizer = load_tokenizer(recipe.model, recipe)
        check_origin(self.triplets, recipe.model, recipe.triplets_model, tokenizer)
        self._encode(TripletCollator(tokenizer, recipe.positions, recipe.alpha))
        plans = []
        for name, rows in self.train.items():
            batches = math.ceil(len(rows) / (recipe.batch_size * arguments.world_size))
            an_epoch = math.ceil(batches / recipe.gradient_accumulation_steps)
            steps = math.ceil(an_epoch * float(arguments.num_train_epochs or 0))
            held_out, finished = len(self.held_out[name]), self._is_finished(name)
            plans.append(TrainPlan(name, len(rows), held_out, steps, finished, self.left_out[name]))
        return plans

    def _encode(self, collator: TripletCollator) -> None:
        """Tokenise all triplets, once, and take out of `train` and `held_out` what can't be used."""
        limit = context_length(load_config(self.recipe.model, self.recipe))
        for name, triplets in self.triplets.items():
            fine, bad = usable(name, triplets, self._files.places[name], collator, limit)
            left_out = [*self._files.left_out[name], *bad]
            check_share(name, len(fine), left_out)
            rows = {id(triplets[i]): row for i, row in fine.items()}
            for side in (self.train, self.held_out):
                had, kept = side[name], [triplet for triplet in side[name] if id(triplet) in rows]
                side[name] = EncodedTriplets(kept, [rows[id(triplet)] for triplet in kept], collator)
                if had and not kept:
                    what = "train on" if side is self.train else "hold out (eval_share)"
                    raise ValueError(f"triplets: of {name!r} nothing is left to {what}. {in_words(left_out)}")
            self.left_out = {**self.left_out, name: left_out}
        self._tokenizer = collator.processing_class

    def _check_folder(self) -> None:
        state = self._state()
        if state:
            self._compare(state)
        for name in self.triplets:
            if folder_name(name) in (CHECKPOINTS, LOGS):
                raise ValueError(f"traits: {name!r} is what another folder of the run is called; rename the trait.")
            if self.folder_of(name).exists() and not self._is_finished(name):
                raise FileExistsError(f"{self.folder_of(name)} is in the way: it holds no adapter of psr train.")

    def _compare(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless this run is the one that was begun."""
        check_same_recipe(self.folder, state["fixed"], self.recipe.fixed())
        for name, rows in self.triplets.items():
            if state["triplets"].get(name, digest(rows)) != digest(rows):
                raise ValueError(
                    f"The triplets of {name!r} are not those that the run in {self.folder} was begun with. Put them "
                    "back to go on with it, or name another folder."
                )
        left = self._left()
        if state["together"] is not None and left and state["together"] != left:
            raise ValueError(
                f"The run in {self.folder} has begun to train {', '.join(state['together'])} together; left to train "
                f"now are {', '.join(left)}. Put traits back to go on with it, or name another folder."
            )

    def _state(self) -> dict[str, Any]:
        return begun_run(self.folder, STATE, "run of psr train", ("fixed", "triplets", "together"))

    def _write_state(self, together: Sequence[str] | None) -> None:
        triplets = self._state().get("triplets", {}) | {name: digest(rows) for name, rows in self.triplets.items()}
        state = {"fixed": self.recipe.fixed(), "triplets": triplets, "together": together}
        write_json(self.folder / STATE, state)

    def folder_of(self, trait: str) -> Path:
        """Where a trait's adapter is, or will be."""
        return self.folder / folder_name(trait)

    def _is_finished(self, trait: str) -> bool:
        """Whether its adapter is whole, in its place or about to be put there."""
        waiting = self.folder.glob(f"{CHECKPOINTS}/*/{FINISHED}/{folder_name(trait)}/{SUMMARY}")
        # in this order: another process may be moving it
        return any(waiting) or (self.folder_of(trait) / SUMMARY).is_file()

    def _left(self) -> list[str]:
        return [name for name in self.triplets if not self._is_finished(name)]

    def run(self) -> dict[str, dict[str, Any]]:
        """Trains what is not finished; returns {trait: what its `summary.json` says}, of all traits, in their order.

        Raises:
            BlockingIOError: another process is at work in the folder.
            FloatingPointError: a loss is infinite or not a number.
            OSError, ValueError, ImportError: as `check`; or the disk is full, for one, and nothing is lost.
        """
        parallel = self.recipe.parallel
        for plan in self.check():
            if plan.left_out and self.writes:
                why = in_words(plan.left_out)
                logger.warning("%s: %d triplets left out. %s", plan.trait, len(plan.left_out), why)
        with locked(self.folder) if self.writes else nullcontext():
            if self.writes:
                self._check_folder()  # another process may have had it meanwhile
            left = self._left()
            if self.writes:
                self._write_state(left if parallel and left else None)
                self._put_in_place()
            PartialState().wait_for_everyone()
            for names in [left] if parallel and left else [[name] for name in left]:
                self._train(names)
            if self.writes:
                self._write_state(None)
                if not self.recipe.keep_checkpoints:
                    shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        return {name: read_json(self.folder_of(name) / SUMMARY) for name in self.triplets}

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files, of several."""
        return PartialState().is_main_process

    def _train(self, names: Sequence[str]) -> None:
        """Train one trait, or several together, and put their adapters in place."""
        recipe = self.recipe
        title = TOGETHER if recipe.parallel else folder_name(names[0])
        adapters = {name: folder_name(name) if recipe.parallel else "default" for name in names}
        train = {adapter: self.train[name] for name, adapter in adapters.items()}
        held_out = {adapter: self.held_out[name] for name, adapter in adapters.items()}
        checkpoints = self.folder / CHECKPOINTS / title
        arguments = make_arguments(recipe, checkpoints)
        checkpoint = last_checkpoint(checkpoints, recipe.early_stopping)
        if self._base is None:
            self._base = load_model(recipe.model, recipe).to(arguments.device)
        begin = time.perf_counter()
        model = add_adapters(self._base, recipe, list(train))
        try:
            if checkpoint is None:
                start_from_data(model, recipe, train, self._tokenizer)
            start_seconds = time.perf_counter() - begin
            trainer = make_trainer(
                model, recipe, arguments, train, held_out, self._tokenizer, title, self.folder / LOGS / title
            )
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.save_model(str(checkpoints / SAVED))
            if self.writes:
                shutil.rmtree(checkpoints / STAGED, ignore_errors=True)
                for name, adapter in adapters.items():
                    more = {
                        "held_out": len(self.held_out[name]),
                        "left_out": as_json(self.left_out[name]),
                        "trained_with": [other for other in names if other != name],
                        "resumed_from_step": None if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1]),
                        "start_seconds": start_seconds,
                    }
                    write_adapter_folder(
                        checkpoints / STAGED / folder_name(name), trainer, adapter, checkpoints / SAVED, recipe, name,
                        self.train[name], more,
                    )  # fmt: skip
                os.replace(checkpoints / STAGED, checkpoints / FINISHED)
                self._put_in_place()
                if not recipe.keep_checkpoints:
                    shutil.rmtree(checkpoints)
            trainer.accelerator.wait_for_everyone()
        finally:
            model.unload()

    def _put_in_place(self) -> None:
        """Move finished adapter folders to where they belong."""
        for folder in sorted(self.folder.glob(f"{CHECKPOINTS}/*/{FINISHED}/*")):
            os.replace(folder, self.folder / folder.name)
