"""A benchmark's folder: triplets, adapters and measurements, each made once, kept whole, and found again by a rerun.

    run.json            the recipe, and versions
    triplets/           a run of `psr triplets` for each model and trait; `held_out/` likewise on the test split
    adapters/<hash>/    what a method made: the adapter, and `fit.json`
    cells/<hash>.json   what was measured of one model, trait, method and seed

A hash is over all that the thing depends on: the recipe without its lists, the triplets, this package's version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from peft_psr.evaluation.methods.method import Fitted
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.files import digest, sha256, write_json
from peft_psr.hub.facts import package_versions
from peft_psr.training import LocalSampler, PromptPair, Triplet, read_triplets, write_triplets
from peft_psr.training.data.by_trait import folder_name, read_traits, scan_traits
from peft_psr.training.judges.base import Judge
from peft_psr.training.progress import Progress
from peft_psr.training.runs.folder_lock import locked
from peft_psr.training.runs.models import load_config, load_model, load_tokenizer
from peft_psr.training.runs.run_folder import begun_run, check_same_recipe
from peft_psr.training.runs.triplets.assembly import check_template, judge_maker, judge_prompts, prompt_pairs
from peft_psr.training.runs.triplets.run import TripletRun
from peft_psr.training.sources.registry import SOURCES, check_test_split

from .given_adapters import check_adapter
from .given_triplets import read_given
from .held_out import draw_held_out
from .recipe import EvaluateRecipe
from .store import keep_adapter, kept_adapter, kept_result


STATE, TRIPLETS, HELD_OUT, ADAPTERS, CELLS = "run.json", "triplets", "held_out", "adapters", "cells"
Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


class Workbench:
    """What a benchmark works with; use it in `with bench.open():`, which holds the folder's lock.

    Args:
        recipe: The benchmark's.
        folder: A new one, or one that a run of the same recipe has left.
        benchmark: The benchmark's name.
        console: Where progress is shown.

    Attributes:
        recipe: As given.
        folder: As given.
        console: As given.
    """

    def __init__(self, recipe: EvaluateRecipe, folder: Path, benchmark: str, console: Console | None = None) -> None:
        self.recipe, self.folder, self.benchmark = recipe, Path(folder), benchmark
        self.console = console or Console(quiet=True)
        self._loaded: dict[str, tuple[PreTrainedModel, Any]] = {}
        self._triplets: dict[tuple[str, str], list[Triplet]] = {}
        self._held_out: dict[tuple[str, str], list[Triplet]] = {}
        self._pairs: dict[Split, dict[str, list[PromptPair]]] = {}
        self._judge_makers: dict[Split, Callable[[str], Judge]] = {}
        self._progress: Progress | None = None

    def check(self) -> None:
        """Raises what can be known to be wrong before any long work; writes nothing.

        Raises:
            FileExistsError: the folder holds something else.
            FileNotFoundError: data, triplets or a file of the recipe are not there.
            OSError: a model's tokenizer can't be had.
            ValueError: the folder's run was begun with another recipe, or a trait, a prompt or a judge is wrong.
        """
        self._check_folder()
        self._judges("test")
        for model in self.recipe.models:
            processing_class = load_tokenizer(model, self.recipe)
            config = load_config(model, self.recipe)
            self.recipe.fit_settings(config.get_text_config().num_hidden_layers, 0)
            check_template(self.recipe, processing_class)
            if self.recipe.triplets:
                read_given(self.recipe, model, self.traits)
        for name, source in self.recipe.adapters.items():
            for place in dict.fromkeys(source.format(trait=folder_name(trait)) for trait in self.traits):
                check_adapter(name, place, self.recipe)

    def _check_folder(self) -> None:
        if begun := begun_run(self.folder, STATE, "run of psr evaluate"):
            now = {"benchmark": self.benchmark, **_filter_of(self.recipe.model_dump()), **self.recipe.fixed()}
            before = {
                "benchmark": begun.get("benchmark"), **_filter_of(begun.get("recipe", {})), **begun.get("fixed", {}),
            }  # fmt: skip
            check_same_recipe(self.folder, before, now)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder while the benchmark runs, and show how far it is.

        Raises:
            BlockingIOError: another process is at work in the folder.
            OSError, ValueError: as `check`.
        """
        self.check()
        with locked(self.folder):
            self._check_folder()
            state = {
                "benchmark": self.benchmark,
                "fixed": self.recipe.fixed(),
                "recipe": self.recipe.model_dump(mode="json"),
                "versions": package_versions(),
            }
            write_json(self.folder / STATE, state, allow_nan=False)
            with Progress(self.benchmark, None, unit="cells", shown=not self.console.quiet) as self._progress:
                yield
            self._progress = None

    # ------------------------------------------------------------ what is measured

    @property
    def traits(self) -> list[str]:
        """The traits of the recipe, by the names that prompt pairs have."""
        return list(self.pairs("test"))

    def method_names(self) -> list[str]:
        """Methods and given adapters, in order."""
        return [*self.recipe.methods, *self.recipe.adapters]

    def pairs(self, split: Split) -> dict[str, list[PromptPair]]:
        """{trait: its prompt pairs} of a split.

        Raises:
            FileNotFoundError: the source's data are not there.
            ValueError: a file of it is malformed, or a trait is unknown.
        """
        if split not in self._pairs:
            by_trait: dict[str, list[PromptPair]] = {}
            for pair in prompt_pairs(self.recipe.triplet_recipe(self.recipe.models[0], self.recipe.traits, split)):
                by_trait.setdefault(pair.trait, []).append(pair)
            self._pairs[split] = by_trait
        return self._pairs[split]

    def judge(self, trait: str) -> Judge:
        """The recipe's judge of a trait; its answers are kept in the run's folder."""
        return self._judges("test")(trait)

    def _judges(self, split: Split) -> Callable[[str], Judge]:
        if split not in self._judge_makers:
            recipe = self.recipe.triplet_recipe(self.recipe.models[0], self.recipe.traits, split)
            pairs = [pair for pairs in self.pairs(split).values() for pair in pairs]
            self._judge_makers[split] = cache(judge_maker(recipe, pairs, self.folder))
        return self._judge_makers[split]

    def load(self, model: str) -> tuple[PreTrainedModel, Any]:
        """A base model in eval mode and its tokenizer; one model is in memory at a time.

        Raises:
            OSError: it can't be had.
        """
        if model not in self._loaded:
            self._loaded.clear()
            recipe = self.recipe
            self._loaded[model] = load_model(model, recipe), load_tokenizer(model, recipe)
        return self._loaded[model]

    def beside(self, name: str, **changes: Any) -> Workbench:
        """A workbench for other data in a folder within this one's, with the same model in memory.

        Args:
            name: The folder's.
            **changes: Fields of the recipe.
        """
        other = Workbench(self.recipe.model_copy(update=changes), self.folder / name, self.benchmark)
        other._loaded, other._progress = self._loaded, self._progress
        return other

    # ------------------------------------------------------------ triplets

    def triplets(self, model: str, trait: str) -> list[Triplet]:
        """A trait's triplets to train on: the recipe's, or drawn from the model into the run's folder.

        Raises:
            NothingKeptError: nothing was kept of what was drawn.
            ValueError: the recipe's triplets are another model's.
        """
        if (model, trait) not in self._triplets:
            if self.recipe.triplets:
                self._triplets[model, trait] = read_given(self.recipe, model, [trait])[trait]
            else:
                self._triplets[model, trait] = self._draw(model, self.pairs("train")[trait])
        return self._triplets[model, trait]

    def _draw(self, model: str, pairs: Sequence[PromptPair]) -> list[Triplet]:
        name = SOURCES[self.recipe.source].trait_name(pairs[0])
        folder = self.folder / TRIPLETS / folder_name(model) / folder_name(name)
        recipe = self.recipe.triplet_recipe(model, (name,))
        self._say(f"triplets: {name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        base, processing_class = self.load(model)
        sampler = LocalSampler(
            base, processing_class, recipe.max_new_tokens, recipe.temperature, recipe.batch_size, name=model
        )
        TripletRun(folder, recipe, pairs, lambda: sampler, self._judges("train")).run()
        return [row for rows in read_traits(folder).values() for row in rows]

    def held_out(self, model: str, trait: str) -> list[Triplet]:
        """A trait's triplets of the test split, which no adapter is trained on; they are not judged.

        Raises:
            ValueError: the source has no test split, or the model answered with nothing.
        """
        check_test_split(self.recipe.source)
        if (model, trait) not in self._held_out:
            pairs = self.pairs("test")[trait]
            drawn_on = digest([[pair.prompt, pair.steered_prompt] for pair in pairs], 16)
            path = self.folder / HELD_OUT / folder_name(model) / f"{folder_name(trait)}-{drawn_on}.jsonl"
            self._held_out[model, trait] = self._draw_held_out(model, pairs, path)
        return self._held_out[model, trait]

    def _draw_held_out(self, model: str, pairs: Sequence[PromptPair], path: Path) -> list[Triplet]:
        if not path.is_file():
            self._say(f"held-out triplets: {pairs[0].trait}")
            rows = draw_held_out(*self.load(model), self.recipe, pairs)
            if not rows:
                raise ValueError(
                    f"{model} answered every held-out prompt of {pairs[0].trait!r} with nothing that can be measured."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_triplets(rows, path)
        return read_triplets(path)

    # ------------------------------------------------------------ adapters

    @contextmanager
    def fitted(
        self,
        model: str,
        trait: str,
        method: str,
        seed: int,
        triplets: Sequence[Triplet] | None = None,
        part: str = "",
    ) -> Iterator[Fitted]:
        """An adapter on its base model, made now or found; it is taken off the model at the end.

        Args:
            model: The base model's name.
            trait: Whose adapter.
            method: A method's name, or that of one of the recipe's adapters.
            seed: Of the training.
            triplets: To train on; the trait's own by default.
            part: What they are called, if they are not the trait's own: a fold, say.

        Raises:
            OSError: a given adapter can't be had.
            ValueError: no such method; or the method can't use the triplets.
        """
        base, processing_class = self.load(model)
        if method in self.recipe.adapters:
            source = self.recipe.adapters[method].format(trait=folder_name(trait))
            given = PeftModel.from_pretrained(base, source).eval()
            own = {name: getattr(given.active_peft_config, name, None) for name in ("alpha", "positions")}
            fitted = Fitted(given, notes={"saved_with": own})
        else:
            rows = self.triplets(model, trait) if triplets is None else list(triplets)
            fitted = self._fit(base, processing_class, model, trait, method, seed, rows, part)
        try:
            yield fitted
        finally:
            fitted.model.unload()

    def _fit(self, base, processing_class, model, trait, method, seed, rows, part) -> Fitted:  # noqa: ANN001
        settings = self.recipe.fit_settings(base.config.get_text_config().num_hidden_layers, seed)
        described = {name: value for name, value in vars(settings).items() if name != "on_step"}
        parameters = {
            "model": model, "revision": self.recipe.revision, "dtype": self.recipe.dtype, "trait": trait,
            "method": method, "part": part, "settings": described, "triplets": digest(rows, 16),
            "version": package_versions()["peft-psr"],
        }  # fmt: skip
        folder = self.folder / ADAPTERS / digest(parameters, 16)
        known = kept_adapter(folder, base)
        if known is not None:
            return known
        self._say(f"{trait}: making {method}, seed {seed} {part}")
        begin = time.perf_counter()
        try:
            fitted = METHODS[method].fit(base, processing_class, rows, settings)
        except BaseException:
            self._loaded.clear()  # half an adapter may be on it
            raise
        fitted.seconds = time.perf_counter() - begin
        keep_adapter(folder, fitted, parameters)
        return fitted

    # ------------------------------------------------------------ measurements

    def expect(self, cells: int) -> None:
        """Say how many cells there will be."""
        if self._progress:
            self._progress.total = cells

    def cell(self, parameters: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, computed once for these parameters and the recipe, and kept as a file.

        Args:
            parameters: What this cell is of, as JSON: model, trait, method, seed.
            compute: Returns JSON; a kill while it works loses no other cell.
        """
        full = {
            "benchmark": self.benchmark, "parameters": parameters, "fixed": self.recipe.fixed(),
            "adapter": self._adapter(parameters.get("method", ""), parameters.get("trait", "")),
            "triplets": self._given_triplets, "filter": asdict(self.recipe.filter),
            "asked": self._asked(parameters.get("trait", "")),
            "version": package_versions()["peft-psr"],
        }  # fmt: skip
        path = self.folder / CELLS / f"{digest(full, 16)}.json"

        made = []

        def announced() -> dict[str, Any]:
            made.append(path)
            self._say(", ".join(str(value) for value in parameters.values() if value != ""))
            return compute()

        result = kept_result(path, full, announced)
        if self._progress:
            self._progress.advance(kept=not made)
        return result

    def _adapter(self, method: str, trait: str) -> Any:
        """Where a given adapter comes from, and what a folder of it holds; `None` for what is made here."""
        source = self.recipe.adapters.get(method)
        if source is None:
            return None
        files = sorted(Path(source.format(trait=folder_name(trait))).glob("adapter_*"))
        return [source, {file.name: sha256(file.read_bytes()) for file in files}]

    def _asked(self, trait: str) -> str:
        """What a trait's prompts and its judge's hash to: the files that they come from may change."""
        recipe = self.recipe.triplet_recipe(self.recipe.models[0], self.recipe.traits, "test")
        pairs = [asdict(pair) for split in SPLITS for pair in self.pairs(split).get(trait, ())]
        own, coherence = judge_prompts(recipe, self.pairs("test").get(trait, ())) if recipe.model_judge else ({}, "")
        return digest([pairs, own.get(trait), coherence], 16)

    @cached_property
    def _given_triplets(self) -> str | None:
        """What the recipe's triplets hash to, if it has any."""
        return digest(scan_traits(self.recipe.triplets).traits, 16) if self.recipe.triplets else None

    def _say(self, what: str) -> None:
        if self._progress:
            self._progress.title = f"{self.benchmark}, {what}"


def _filter_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that filter triplets: all methods of a run are to be made from the same."""
    return {name: recipe.get(name) for name in ("min_trait_score", "min_coherence_score", "max_similarity")}
