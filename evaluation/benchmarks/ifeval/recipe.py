"""The recipe of `psr evaluate ifeval`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe
from peft_psr.training.runs.recipe_fields import FREE, Place, split


FiniteAlpha = Annotated[float, Field(allow_inf_nan=False)]
FiniteAlphas = Annotated[tuple[FiniteAlpha, ...], Field(min_length=1), BeforeValidator(split)]


class IFEvalRecipe(EvaluateRecipe):
    """What `psr evaluate ifeval` measures. Each field is an option of it too."""

    source: Literal["ifeval"] = Field("ifeval", description="IFEval's pairs of prompts.")
    judge: Literal["ifeval"] = Field("ifeval", description="IFEval's published checkers.")
    folds: Annotated[int, Field(ge=2)] = Field(
        2,
        description="Parts of each type's prompts; each is answered with adapters made from the others' triplets.",
    )
    train_data: Place | None = Field(
        None,
        description="Other prompts to draw the training triplets on, laid out as data: one adapter then answers all "
        "of a type's prompts, without folds.",
    )
    alphas: FiniteAlphas = Field((1.0,), json_schema_extra=FREE, description="Strengths of the adapters, each a row.")
    answer_temperature: float = Field(
        0.0, ge=0, description="Of the answers that are scored; 0 takes the likeliest token, as lm-eval's IFEval does."
    )

    @model_validator(mode="after")
    def _check_training(self) -> IFEvalRecipe:
        if self.train_data and self.triplets:
            raise ValueError("triplets are there already: leave out train_data, which further ones would be drawn on.")
        return self
