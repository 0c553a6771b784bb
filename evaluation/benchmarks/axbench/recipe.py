"""The recipe of `psr evaluate axbench`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, PositiveAlphas
from peft_psr.training.judges.ratings import rating_model
from peft_psr.training.runs.recipe_fields import Place
from peft_psr.training.runs.triplets.recipe import JudgeName


class AxBenchRecipe(EvaluateRecipe):
    """What `psr evaluate axbench` measures. Each field is an option of it too."""

    source: Literal["axbench"] = Field("axbench", description="AxBench's concepts.")
    judge: JudgeName = Field(
        description="Where the model runs that judges: on a server, or here. It scores triplets and rates answers."
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(128, description="Longest completion and answer, in tokens.")
    train_alpha: Literal["trait_score"] | float = Field(
        1.0, description="Strength while training: each triplet's trait score / 100, or one number."
    )
    own_answers: bool = Field(
        False,
        description="Train on the data set's own answers, which another model wrote, in place of answers that the "
        "model itself draws on prompts that ask for the concept.",
    )
    questions_data: Place | None = Field(
        None,
        description="File of instructions to try the concepts on, in AlpacaEval's layout or one a line; by default "
        "questions of the data set's shared negatives.",
    )
    test_instructions: Annotated[int, Field(ge=2)] = Field(
        10, description="Instructions for each concept: half to choose the factor on, half to score."
    )
    factors: PositiveAlphas = Field(
        (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0),
        description="Strengths to choose from, with commas between them.",
    )

    @field_validator("factors")
    @classmethod
    def _by_size(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(factors)))

    @model_validator(mode="after")
    def _check_ratings(self) -> AxBenchRecipe:
        rating_model(self.judge)
        return self

    @model_validator(mode="after")
    def _check_own_answers(self) -> AxBenchRecipe:
        if self.own_answers and self.train_alpha == "trait_score":
            raise ValueError("own_answers: the data set's answers have no trait scores; give train_alpha as a number.")
        if self.own_answers and self.triplets:
            raise ValueError("own_answers and triplets both say what to train on; leave one of them out.")
        return self
