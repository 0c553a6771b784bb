"""The recipe of `psr evaluate persona`."""

from pydantic import Field, field_validator

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, Positions, PositiveAlphas, load_evaluate_recipe
from peft_psr.tiny_chat import EMBEDDED, TRAITS
from peft_psr.training.runs.recipe_fields import Count


class PersonaRecipe(EvaluateRecipe):
    """What `psr evaluate persona` measures. Each field is an option of it too."""

    positions: Positions = Field("question_and_response", description="Edited tokens.")
    strengths: PositiveAlphas = Field(
        (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), description="Strengths to measure before any are searched for."
    )
    calibration_steps: Count = Field(8, description="Further strengths tried for each of TA@C80 and TA@Cp.")
    score_draws: Count = Field(10, description="Answers to each held-out question at each strength.")

    @field_validator("strengths")
    @classmethod
    def _with_one(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({1.0, *strengths}))


def demo_recipe(trait: str, model: str = EMBEDDED, seed: int = 0, quick: bool = False) -> PersonaRecipe:
    """The recipe `persona-demo`, or `persona-demo-quick`, for one trait; `ValueError` if there is no such trait."""
    if trait not in TRAITS:
        raise ValueError(f"No trait {trait!r}; there are: {', '.join(TRAITS)}, or 'all'.")
    options = {"traits": (trait,), "models": (model,), "seed": seed, "seeds": (seed,)}
    return load_evaluate_recipe(PersonaRecipe, "persona-demo-quick" if quick else "persona-demo", options)
