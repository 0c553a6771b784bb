"""`run.json` of a benchmark's folder: which recipe the run was begun with, so that no other goes on in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_psr.files import write_json
from peft_psr.hub.facts import package_versions
from peft_psr.training.runs.run_folder import begun_run, check_same_recipe

from .recipe import EvaluateRecipe


STATE = "run.json"


def check_folder(folder: Path, benchmark: str, recipe: EvaluateRecipe) -> None:
    """Checks that a folder is new, or one that a run of the same recipe has left.

    `FileExistsError` if it holds something else, `ValueError` if the run in it was begun with another recipe.
    """
    if begun := begun_run(folder, STATE, "run of psr evaluate"):
        now = {"benchmark": benchmark, **_filter_of(recipe.model_dump()), **recipe.fixed()}
        before = {"benchmark": begun.get("benchmark"), **_filter_of(begun.get("recipe", {})), **begun.get("fixed", {})}
        check_same_recipe(folder, before, now)


def write_state(folder: Path, benchmark: str, recipe: EvaluateRecipe) -> None:
    """Writes what `check_folder` reads."""
    state = {
        "benchmark": benchmark,
        "fixed": recipe.fixed(),
        "recipe": recipe.model_dump(mode="json"),
        "versions": package_versions(),
    }
    write_json(folder / STATE, state, allow_nan=False)


def _filter_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that filter triplets: all methods of a run are to be made from the same."""
    return {name: recipe.get(name) for name in ("min_trait_score", "min_coherence_score", "max_similarity")}
