"""What every benchmark's recipe has: models, methods and traits to compare, and how their adapters are made.

A recipe is a matrix: each benchmark measures every method on every trait of every model, with every seed.
"""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from peft_psr.evaluation.methods.method import PLAIN, PROMPT, FitSettings
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.training.runs.recipe_fields import (
    FREE,
    Count,
    Names,
    Place,
    Places,
    TraitNames,
    read_recipe,
    split,
    yaml_files,
)
from peft_psr.training.runs.triplets.recipe import DrawFields, Recipe
from peft_psr.training.sources.registry import SOURCES


Positions = Literal["response", "question_and_response", "all"]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), BeforeValidator(split)]
PositiveAlpha = Annotated[float, Field(gt=0)]
PositiveAlphas = Annotated[tuple[PositiveAlpha, ...], Field(min_length=1), BeforeValidator(split)]


class EvaluateRecipe(DrawFields):
    """A matrix of models, methods, traits and seeds. Each field is an option of `psr evaluate` too.

    Fields that say so in their `json_schema_extra` may change between the starts of one run: what was measured before
    is found again, so a matrix can grow.
    """

    traits: TraitNames = Field(
        (), json_schema_extra=FREE, description="Traits or concepts by name, with commas between them; all by default."
    )
    models: Places = Field(
        min_length=1,
        json_schema_extra=FREE,
        description="Hub names or folders of base models, with commas between them; 'embedded' is the one in the "
        "package.",
    )
    methods: Names = Field(
        ("S-Const DiM", "S-PSR MSE", "A-PSR MSE"),
        json_schema_extra=FREE,
        description="Methods to make adapters by, with commas between them; 'all' for every one, 'none' for none. "
        "The plain and the prompted model are always measured. `psr methods` lists them.",
    )
    adapters: dict[str, Place] = Field(
        {},
        json_schema_extra=FREE,
        description='Adapters to measure beside them: {"name": "folder or Hub name"}, with {trait} in it where each '
        "trait has its own. They are measured at the recipe's strengths, whatever they were saved with.",
    )
    seeds: Seeds = Field(
        (0,),
        json_schema_extra=FREE,
        description="One adapter for each: of the start, the order of the triplets and the scored answers.",
    )
    triplets: Place | None = Field(
        None,
        json_schema_extra=FREE,  # the triplets themselves enter what is kept of an adapter
        description="What psr triplets wrote, to train on; drawn into the run's folder by default. Must be of the one "
        "model that is measured.",
    )

    held_out_draws: Count = Field(
        1, description="Completions for each instruction and question of the test split, to measure faithfulness on."
    )
    layer: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="The layer that single-layer methods edit, from 0; the one before the middle by default.",
    )
    positions: Positions = Field("response", description="Edited tokens.")
    train_alpha: Literal["trait_score"] | float = Field(
        "trait_score", description="Strength while training: each triplet's trait score / 100, or one number."
    )
    epochs: float = Field(15.0, gt=0, description="Passes over the triplets for the MSE and KL objectives.")
    text_epochs: float = Field(7.0, gt=0, description="Passes over the triplets for likelihood and preference.")
    train_batch_size: Count = Field(8, description="Triplets a training step.")
    learning_rate: float | None = Field(None, gt=0, description="For every method, in place of its own.")

    @field_validator("traits", "models", "methods", "seeds")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("methods")
    @classmethod
    def _all_or_none(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if methods == ("all",):
            return tuple(METHODS)
        return () if methods == ("none",) else methods

    @model_validator(mode="after")
    def _check_matrix(self) -> EvaluateRecipe:
        for name in self.methods:
            METHODS.check(name)
        own_turn = SOURCES[self.source].takes_instruction
        if self.methods and self.positions != "response" and not (own_turn and self.placement == "system"):
            raise ValueError(
                f"positions: {self.positions} needs the instruction in the system turn: in the user's, the question's "
                "own tokens differ. Use positions: response."
            )
        for name, source in self.adapters.items():
            if name in METHODS or name in (PLAIN, PROMPT):
                raise ValueError(f"adapters: {name!r} is what a method is called; give the adapter another name.")
            places = {place for _, place, _, _ in Formatter().parse(source) if place is not None}
            if places - {"trait"}:
                raise ValueError(f"adapters: {source!r} may hold {{trait}} and no other placeholder.")
        if self.triplets and len(self.models) > 1:
            raise ValueError("triplets are of one model; leave them out to have each model draw its own.")
        if self.adapters and len(self.models) > 1:
            raise ValueError("adapters are of one model; measure each model's with an --output of its own.")
        self.triplet_recipe(self.models[0], self.traits)
        return self

    def triplet_recipe(self, model: str, traits: tuple[str, ...], split: Literal["train", "test"] = "train") -> Recipe:
        """The recipe of `psr triplets` for one of the models: what it draws, and who judges; raises as one."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in DrawFields.model_fields}
        one_split = {"split": split} if SOURCES[self.source].has_test_split else {}
        try:
            return Recipe.model_validate({**shared, **one_split, "model": model, "traits": traits})
        except ValidationError as error:
            raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None

    def sampling(self, seed: int | None) -> dict[str, Any]:
        """How scored answers are drawn, as `sample_completions` takes it."""
        shared = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "batch_size")}
        return {**shared, "seed": seed or 0}

    def fit_settings(self, num_layers: int, seed: int) -> FitSettings:
        """What methods are given for a model of so many decoder layers; `ValueError` if it lacks the layer."""
        layer = (num_layers - 1) // 2 if self.layer is None else self.layer
        if layer >= num_layers:
            raise ValueError(f"layer: {layer} is not there; the model's {num_layers} decoder layers count from 0.")
        return FitSettings(
            layer=layer,
            positions=self.positions,
            seed=seed,
            epochs=(self.epochs, self.text_epochs),
            batch_size=self.train_batch_size,
            learning_rate=self.learning_rate,
            alpha=self.train_alpha,
        )


Kind = TypeVar("Kind", bound=EvaluateRecipe)


def load_evaluate_recipe(kind: type[Kind], recipe: str | Path | None, options: dict[str, Any]) -> Kind:
    """Reads and checks a benchmark's recipe, one that ships or a file; see `read_recipe`."""
    return read_recipe(kind, recipe, options, shipped_evaluate_recipes())


def shipped_evaluate_recipes() -> dict[str, Path]:
    """Returns {name: file} of the recipes in the package."""
    return yaml_files(Path(__file__).parent / "recipes")
