"""The recipe of `psr evaluate side-effects`."""

from typing import Literal

from pydantic import Field

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, PositiveAlpha, PositiveAlphas
from peft_psr.training.runs.recipe_fields import FREE, Count, Names, Place


class SideEffectsRecipe(EvaluateRecipe):
    """What `psr evaluate side-effects` measures. Each field is an option of it too."""

    alpha: Literal["matched"] | PositiveAlpha = Field(
        "matched",
        description="Strength to compare at: matched, where the trait is the prompted model's, or a number.",
    )
    strengths: PositiveAlphas = Field(
        (0.06, 0.12, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0),
        description="Strengths among which the matched one is looked for.",
    )
    score_draws: Count = Field(4, description="Answers to each held-out question, and to each unsafe request.")
    capability_tasks: Names = Field(
        (), json_schema_extra=FREE, description="Tasks of lm-evaluation-harness, with commas between them."
    )
    capability_limit: Count | None = Field(
        None, json_schema_extra=FREE, description="At most so many questions of each such task."
    )
    capability_include_path: Place | None = Field(
        None, json_schema_extra=FREE, description="Folder with such tasks of your own, as YAML files."
    )
