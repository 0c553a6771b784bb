"""Training recipes: one YAML file that describes a run of `psr train`, checked field by field before it begins.

Those that ship are in `train_recipes/` beside this file; `shipped_train_recipes` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from peft_psr.training.objectives.registry import OBJECTIVES
from peft_psr.training.runs.recipe_fields import (
    FREE,
    Count,
    ModelFields,
    Place,
    Registered,
    TraitNames,
    read_recipe,
    split,
    yaml_files,
)
from peft_psr.training.starts.registry import STARTS


Layer = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[Layer, ...], Field(min_length=1), BeforeValidator(split)]
Weight = Annotated[float, Field(ge=0)]
Objective = Annotated[str, Registered(OBJECTIVES)]


class TrainRecipe(ModelFields):
    """What is trained on which triplets, and how. Each field is an option of `psr train` too.

    Fields that may change between the starts of one run say so in their `json_schema_extra`; the others decide what
    the adapters come to. Defaults are those of `PSRConfig` and `PSRTrainingArguments`.
    """

    description: str = Field("", description="One line that `psr recipes` shows.", json_schema_extra=FREE)

    model: Place = Field(
        min_length=1, description="Hub name or folder of the base model; 'embedded' is the one in the package."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the base model; adapters are float32."
    )
    triplets: Place = Field(
        min_length=1,
        json_schema_extra=FREE,  # it may move: the triplets themselves are compared
        description="What psr triplets wrote: the folder, or a JSONL file (also a folder of those, one a trait).",
    )
    triplets_model: Place | None = Field(
        None,
        json_schema_extra=FREE,
        description="The base model's name in the triplets, where that is another one: a server's name for it, say.",
    )
    traits: TraitNames = Field(
        (), json_schema_extra=FREE, description="Traits by name, with commas between them; all by default."
    )
    parallel: bool = Field(
        False, description="Train the traits together, rows of different ones in a batch, not one after another."
    )
    eval_share: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts, with all their completions, held out for a loss."
    )
    early_stopping: Count | None = Field(
        None,
        description="Stop when the held-out loss has not got better so many times running, and take the best weights.",
    )
    seed: int = Field(123, ge=0, description="Of the start, the shuffling and what is held out.")

    r: Count = Field(1, description="Rank of the edit.")
    gate: Literal["relu", "constant"] = Field("relu", description="PSR, or a plain steering vector.")
    layers_to_transform: Layer | Layers | None = Field(
        None, description="Decoder layers to edit, from 0, with commas between them; none: all of them."
    )
    positions: Literal["response", "question_and_response", "all"] = Field("response", description="Edited tokens.")
    start: Annotated[str, Registered(STARTS)] = Field(
        "live",
        description="At random as a linear layer (the reported runs), a no-op with open gates, the mean difference "
        "with open gates, or gates fitted to it by ridge regression.",
    )

    objective: Objective | dict[Objective, Weight] = Field(
        "mse",
        description="The prompted model's activations, the likelihood of its answers, its next-token distributions, "
        'or weights for a sum: {"mse": 1.0, "kl": 5.0}.',
    )
    normalize_loss: Literal["global", "layer"] | None = Field(
        None, description="Divide the MSE by what it is without an edit: as a whole, or each layer's by its own."
    )
    regularizer: Weight = Field(0.0, description="Weight of the hinge that wants gates to open.")
    alpha: Literal["trait_score"] | float = Field(
        "trait_score", description="Strength while training: each triplet's trait score / 100, or one number."
    )
    neutral_weight: Weight = Field(
        1.0, description="Weight of triplets whose two prompts are equal, on which the adapter is to do nothing."
    )
    norm_penalty: Weight = Field(0.0, description="Weight of the edit's squared norm relative to the stream's.")

    epochs: float | None = Field(
        None, gt=0, description="Passes over the triplets; none: the objective's own number, 15, or 7 for ll."
    )
    batch_size: Count = Field(1, description="Triplets a step and device.")
    gradient_accumulation_steps: Count = Field(1, description="Batches to a step of the optimizer.")
    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW at the start; falls linearly to 0.")
    bf16: bool = Field(False, description="Mixed precision in bfloat16.")
    teacher_cache: Literal["auto", "memory", "disk", "none"] = Field(
        "auto",
        json_schema_extra=FREE,
        description="Where to keep the frozen model's activations between epochs; auto: in memory if they fit.",
    )
    teacher_cache_gb: float = Field(
        4.0, gt=0, json_schema_extra=FREE, description="Most that these may take, in GB; more is computed anew."
    )

    checkpoint_steps: Count | None = Field(
        None, description="Steps between checkpoints, and held-out losses; none: an epoch."
    )
    keep_checkpoints: bool = Field(
        False, json_schema_extra=FREE, description="Leave the checkpoints there when all is done."
    )
    report_to: Literal["none", "tensorboard"] = Field(
        "none", json_schema_extra=FREE, description="Write TensorBoard's logs into the output folder."
    )

    @field_validator("traits")
    @classmethod
    def _all(cls, traits: tuple[str, ...]) -> tuple[str, ...]:
        return () if traits == ("all",) else traits

    @model_validator(mode="after")
    def _check_together(self) -> TrainRecipe:
        if self.early_stopping and not self.eval_share:
            raise ValueError("early_stopping needs a held-out loss: set eval_share, to 0.1 say.")
        if self.early_stopping and self.parallel:
            raise ValueError(
                "early_stopping would stop all traits of a parallel run at once; leave one of the two out."
            )
        if isinstance(self.objective, dict) and not any(self.objective.values()):
            raise ValueError(f"objective: the weights must not all be 0, got {self.objective}.")
        return self


def load_train_recipe(recipe: str | Path | None, options: Mapping[str, Any] | None = None) -> TrainRecipe:
    """Reads and checks a training recipe, one that ships or a file; see `read_recipe`."""
    return read_recipe(TrainRecipe, recipe, options, shipped_train_recipes())


def shipped_train_recipes() -> dict[str, Path]:
    """Returns {name: file} of the training recipes in the package."""
    return yaml_files(Path(__file__).parent / "recipes")
