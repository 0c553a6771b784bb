"""A benchmark's folder: triplets, adapters and measurements, each made once, kept whole, and found again by a rerun.

    run.json            the recipe, and versions
    triplets/           a run of `psr triplets` for each model and trait; `held_out/` likewise on the test split
    adapters/<hash>/    what a method made: the adapter, and `fit.json`
    cells/<hash>.json   what was measured of one model, trait, method and seed

A hash is over all that the thing depends on: the recipe without its lists, the triplets, this package's version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.methods.method import PLAIN, PROMPT, Fitted
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.files import digest, sha256
from peft_psr.hub.facts import package_versions
from peft_psr.training import LocalSampler, PromptPair, Triplet, read_triplets, write_triplets
from peft_psr.training.data.by_trait import folder_name, read_traits, scan_traits
from peft_psr.training.judges.base import Judge
from peft_psr.training.progress import Progress
from peft_psr.training.runs.models import load_config, load_model, load_tokenizer
from peft_psr.training.runs.run_folder import locked
from peft_psr.training.runs.triplets.assembly import check_template, judge_maker, judge_prompts, prompt_pairs
from peft_psr.training.runs.triplets.run import TripletRun
from peft_psr.training.sources.registry import SOURCES, check_test_split

from .cell import Cell, Result, grouped
from .given import check_adapter, read_given
from .held_out import draw_held_out
from .recipe import EvaluateRecipe
from .run_state import check_folder, write_state
from .store import keep_adapter, keep_result, kept_adapter, kept_result


Split = Literal["train", "test"]
Recipe = TypeVar("Recipe", bound=EvaluateRecipe)


class Workbench(Generic[Recipe]):
    """What a benchmark works with, in a new folder or one of the same recipe; use it in `with bench.open():`."""

    def __init__(self, recipe: Recipe, folder: Path, benchmark: str, console: Console | None = None) -> None:
        self.recipe, self.folder, self.benchmark = recipe, Path(folder), benchmark
        self.console = console or Console(quiet=True)
        self._loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
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
        check_folder(self.folder, self.benchmark, self.recipe)
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

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder, or raise `BlockingIOError` if another process does; show how far the benchmark is."""
        self.check()
        with locked(self.folder):
            check_folder(self.folder, self.benchmark, self.recipe)
            write_state(self.folder, self.benchmark, self.recipe)
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
        """{trait: its prompt pairs} of a split."""
        if split not in self._pairs:
            pairs = prompt_pairs(self.recipe.triplet_recipe(self.recipe.models[0], self.recipe.traits, split))
            self._pairs[split] = grouped((pair.trait, [pair]) for pair in pairs)
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

    def load(self, model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A base model in eval mode and its tokenizer; one model is in memory at a time."""
        if model not in self._loaded:
            self._loaded.clear()
            recipe = self.recipe
            self._loaded[model] = load_model(model, recipe), load_tokenizer(model, recipe)
        return self._loaded[model]

    def beside(self, name: str, **changes: Any) -> Workbench[Recipe]:
        """A workbench with other fields of the recipe in a folder within this one's, with the same model in memory."""
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
        folder = self.folder / "triplets" / folder_name(model) / folder_name(name)
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
        """A trait's triplets of the test split, not judged; `ValueError` if there are none, or all are empty."""
        check_test_split(self.recipe.source)
        if (model, trait) not in self._held_out:
            pairs = self.pairs("test")[trait]
            drawn_on = digest([[pair.prompt, pair.steered_prompt] for pair in pairs], 16)
            path = self.folder / "held_out" / folder_name(model) / f"{folder_name(trait)}-{drawn_on}.jsonl"
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
    def fitted(self, cell: Cell, triplets: Sequence[Triplet] | None = None, part: str = "") -> Iterator[Fitted]:
        """A cell's adapter on its base model, given, made now or found; it is taken off the model at the end.

        It is trained on the trait's own triplets, or on others, which `part` names: a fold, say.

        Raises:
            OSError: a given adapter can't be had.
            ValueError: no such method; or the method can't use the triplets.
        """
        if cell.method in self.recipe.adapters:
            fitted = self._given(cell)
        else:
            rows = self.triplets(cell.model, cell.trait) if triplets is None else list(triplets)
            fitted = self._fit(cell, rows, part)
        try:
            yield fitted
        finally:
            fitted.model.unload()

    def _given(self, cell: Cell) -> Fitted:
        source = self.recipe.adapters[cell.method].format(trait=folder_name(cell.trait))
        given = PeftModel.from_pretrained(self.load(cell.model)[0], source).eval()
        own = {name: getattr(given.active_peft_config, name, None) for name in ("alpha", "positions")}
        return Fitted(given, notes={"saved_with": own})

    def _fit(self, cell: Cell, triplets: Sequence[Triplet], part: str) -> Fitted:
        base, processing_class = self.load(cell.model)
        seed = cell.seed or 0
        settings = self.recipe.fit_settings(base.config.get_text_config().num_hidden_layers, seed)
        described = {name: value for name, value in vars(settings).items() if name != "on_step"}
        parameters = {
            "model": cell.model, "revision": self.recipe.revision, "dtype": self.recipe.dtype, "trait": cell.trait,
            "method": cell.method, "part": part, "settings": described, "triplets": digest(triplets, 16),
            "version": package_versions()["peft-psr"],
        }  # fmt: skip
        folder = self.folder / "adapters" / digest(parameters, 16)
        known = kept_adapter(folder, base)
        if known is not None:
            return known
        self._say(f"{cell.trait}: making {cell.method}, seed {seed} {part}")
        begin = time.perf_counter()
        try:
            fitted = METHODS[cell.method].fit(base, processing_class, triplets, settings)
        except BaseException:
            self._loaded.clear()  # half an adapter may be on it
            raise
        fitted.seconds = time.perf_counter() - begin
        keep_adapter(folder, fitted, parameters)
        return fitted

    # ------------------------------------------------------------ measurements

    def matrix(self) -> list[Cell]:
        """Every method of every model, trait and seed, each after the plain and the prompted model."""
        return [
            Cell(model, trait, method, seed)
            for model in self.recipe.models
            for trait in self.traits
            for seed in self.recipe.seeds
            for method in (PLAIN, PROMPT, *self.method_names())
        ]

    def expect(self, cells: int) -> None:
        """Say how many cells there will be."""
        if self._progress:
            self._progress.total = cells

    def cells(self, cells: Iterable[Cell], measure: Callable[[Cell], Result]) -> list[Cell]:
        """The cells with their results, in order: each is measured once, kept as a file, and found again.

        `measure` returns JSON; a kill while it works loses no other cell. It may ask for an earlier cell's by `kept`.
        """
        return self.cells_together(([cell] for cell in cells), lambda group: [measure(group[0])])

    def cells_together(
        self, groups: Iterable[Sequence[Cell]], measure: Callable[[Sequence[Cell]], Sequence[Result]]
    ) -> list[Cell]:
        """As `cells`, for groups measured together: `measure` returns the results of those of a group not kept yet."""
        return [cell for group in groups for cell in self._group(group, measure)]

    def _group(self, group: Sequence[Cell], measure: Callable[[Sequence[Cell]], Sequence[Result]]) -> list[Cell]:
        of = [cell.parameters for cell in group]
        results = self._results(of, lambda missing: measure([group[i] for i in missing]))
        return [replace(cell, result=result) for cell, result in zip(group, results, strict=True)]

    def kept(self, cell: Cell) -> Result:
        """What was measured of a cell before; `KeyError` if nothing was."""
        result = kept_result(self._place(cell.parameters)[0])
        if result is None:
            raise KeyError(f"Nothing is measured yet of {cell.parameters}.")
        return result

    def cell(self, parameters: dict[str, Any], compute: Callable[[], Result]) -> Result:
        """What `compute` returns, computed once for these parameters and the recipe: a result beside the matrix's."""
        return self._results([parameters], lambda missing: [compute()])[0]

    def _results(
        self, of: Sequence[Mapping[str, Any]], measure: Callable[[list[int]], Sequence[Result]]
    ) -> list[Result]:
        """The result of each, kept or measured now; `measure` is told the numbers of those that are not kept."""
        places = [self._place(parameters) for parameters in of]
        results = {i: found for i, (path, _) in enumerate(places) if (found := kept_result(path)) is not None}
        missing = [i for i in range(len(of)) if i not in results]
        if missing:
            self._say(", ".join(str(value) for value in of[missing[0]].values() if value != ""))
            for i, result in zip(missing, measure(missing), strict=True):
                results[i] = keep_result(*places[i], result)
        for i in range(len(of)):
            if self._progress:
                self._progress.advance(kept=i not in missing)
        return [results[i] for i in range(len(of))]

    def _place(self, parameters: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The file of a result, and all that decides the result."""
        trait = parameters.get("trait", "")
        key = {
            "benchmark": self.benchmark, "parameters": dict(parameters), "fixed": self.recipe.fixed(),
            "adapter": self._adapter(parameters.get("method", ""), trait), "triplets": self._given_triplets,
            "filter": asdict(self.recipe.filter), "asked": self._asked(trait),
            "version": package_versions()["peft-psr"],
        }  # fmt: skip
        return self.folder / "cells" / f"{digest(key, 16)}.json", key

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
        pairs = [asdict(pair) for split in get_args(Split) for pair in self.pairs(split).get(trait, ())]
        own, coherence = judge_prompts(recipe, self.pairs("test").get(trait, ())) if recipe.model_judge else ({}, "")
        return digest([pairs, own.get(trait), coherence], 16)

    @cached_property
    def _given_triplets(self) -> str | None:
        """What the recipe's triplets hash to, if it has any."""
        return digest(scan_traits(self.recipe.triplets).traits, 16) if self.recipe.triplets else None

    def _say(self, what: str) -> None:
        if self._progress:
            self._progress.title = f"{self.benchmark}, {what}"
