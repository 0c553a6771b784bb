"""The recipe of `psr evaluate faithfulness`."""

from pydantic import Field

from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, PositiveAlphas
from peft_psr.training.runs.recipe_fields import FREE
from peft_psr.training.sources.registry import SOURCES


NEUTRAL_INSTRUCTION = (
    "You are a helpful assistant. Read the question with care, then answer it in the way you usually would."
)
EMBEDDED_NEUTRAL_INSTRUCTION = "Answer the question."


class FaithfulnessRecipe(EvaluateRecipe):
    """What `psr evaluate faithfulness` measures."""

    alphas: PositiveAlphas = Field(
        (1.0,), json_schema_extra=FREE, description="Strengths to measure at, with commas between them."
    )
    neutral_instruction: str | None = Field(
        None,
        description="The control: an instruction that does not ask for the trait, put where the trait's are; one "
        "about answering the question by default.",
    )

    @property
    def control(self) -> str:
        """The neutral instruction."""
        if self.neutral_instruction is not None:
            return self.neutral_instruction
        return EMBEDDED_NEUTRAL_INSTRUCTION if SOURCES[self.source].embedded_words else NEUTRAL_INSTRUCTION
