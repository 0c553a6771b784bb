"""Recipes: one YAML file that describes a run of `psr triplets`, checked field by field before anything is loaded.

Those that ship are in `recipes/` beside this file; `shipped_recipes` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from peft_psr.tiny_chat import EMBEDDED
from peft_psr.training.data.filtering import FilterSettings
from peft_psr.training.data.placement import Placement
from peft_psr.training.judges.registry import JUDGES
from peft_psr.training.runs.recipe_fields import (
    FREE,
    Count,
    ModelFields,
    Place,
    Registered,
    Share,
    TraitNames,
    read_recipe,
    yaml_files,
)
from peft_psr.training.sources.base import Selection, Split
from peft_psr.training.sources.registry import SOURCES


Url = Annotated[str, Field(pattern=r"^https?://[^@?\s]+$")]
VariableName = Annotated[str, Field(pattern="^[A-Z_][A-Z0-9_]*$")]
JudgeName = Annotated[str, Registered(JUDGES)]
LeastScore = Annotated[float, Field(ge=0, le=100)]


class DrawFields(ModelFields):
    """Where prompts come from, what is drawn here, who judges it and what is kept.

    Fields that may change between the starts of one run (they decide how fast, how stubbornly, and what is kept, but
    not what is drawn and judged) say so in their `json_schema_extra`.
    """

    description: str = Field("", description="One line that `psr recipes` shows.", json_schema_extra=FREE)

    source: Annotated[str, Registered(SOURCES)] = Field(
        description="Where traits and questions come from: the embedded model's grammar, trait files in the Persona "
        "Vectors layout, IFEval's pairs of prompts, AxBench's concepts."
    )
    data: Place | None = Field(
        None, description="File, folder or Hub data set of the source; for personas, the traits that ship by default."
    )
    data_revision: str | None = Field(None, description="Branch, tag or commit of a data set on the Hub.")
    traits: TraitNames = Field((), description="Traits or concepts by name, with commas between them; all by default.")
    instructions: Count | None = Field(None, description="At most so many instructions a trait; all by default.")
    questions: Count | None = Field(None, description="At most so many questions a trait; all by default.")
    draws: Count = Field(10, description="Completions for each instruction and question.")
    placement: Placement = Field(
        "system", description="Where the instruction stands: in the system turn, before the user's text, or after it."
    )
    seed: int = Field(0, ge=0, description="Every draw's own seed follows from it.")

    revision: str | None = Field(None, description="Branch, tag or commit of the model on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Of a local model.")
    device_map: str = Field(
        "auto", description="Where accelerate puts a local model: auto, cpu, cuda:1, ...", json_schema_extra=FREE
    )
    max_new_tokens: Count = Field(256, description="Longest completion, in tokens.")
    temperature: float = Field(1.0, ge=0, description="Of the sampling; 0 takes the likeliest token.")
    batch_size: Count = Field(
        64, description="Most completions drawn together here; halved when memory runs out.", json_schema_extra=FREE
    )
    concurrency: Count = Field(32, description="Requests in flight at a server.", json_schema_extra=FREE)
    timeout: float = Field(120.0, gt=0, description="Seconds until a request is tried again.", json_schema_extra=FREE)
    max_failure_share: Share = Field(
        0.1,
        description="A run stops when more than this share of its requests fails for good.",
        json_schema_extra=FREE,
    )

    judge: JudgeName = Field(
        description="Who scores: the embedded model's grammar, IFEval's checkers, a model on a server, a model here."
    )
    coherence_judge: JudgeName | None = Field(
        None, description="Who scores coherence for judge: ifeval, whose checkers don't."
    )
    judge_model: Place | None = Field(None, description="The model of a judge that is server or local.")
    judge_revision: str | None = Field(None, description="Its revision on the Hub, for a local judge.")
    judge_url: Url | None = Field(
        None, description="The judge's server; that of the sampler by default.", json_schema_extra=FREE
    )
    judge_key_variable: VariableName = Field(
        "OPENAI_API_KEY",
        description="Environment variable with the judge server's key, if it wants one.",
        json_schema_extra=FREE,
    )
    judge_fields: dict[str, Any] = Field({}, description="More fields of each request to the judge's server.")
    judge_batch_size: Count = Field(
        16, description="Most questions that a local judge reads together.", json_schema_extra=FREE
    )
    judge_cache: Place | None = Field(
        None,
        description="File that keeps a judge's answers, for other runs too; in the run's folder by default.",
        json_schema_extra=FREE,
    )
    trait_prompt: Place | None = Field(
        None, description="File with a trait prompt for the judge, in place of its own."
    )
    coherence_prompt: Place | None = Field(None, description="File with a coherence prompt for the judge.")

    min_trait_score: LeastScore = Field(
        50.0, description="A triplet needs as much, a negative less.", json_schema_extra=FREE
    )
    min_coherence_score: LeastScore = Field(
        50.0, description="Every completion kept needs as much.", json_schema_extra=FREE
    )
    max_similarity: float | None = Field(
        0.9,
        gt=0,
        le=1,
        json_schema_extra=FREE,
        description="Of two completions on one prompt that are at least so similar, the second is dropped; 1: only "
        "equal ones; none: none.",
    )

    @model_validator(mode="after")
    def _check_judge(self) -> DrawFields:
        source = SOURCES[self.source]
        needs = {
            "judge_model": self.model_judge is not None and f"a judge that is {self.model_judge}",
            "data": source.needs_data and f"source: {self.source}",
        }
        for name, reason in needs.items():
            if reason and not getattr(self, name):
                raise ValueError(f"{reason} needs {name}: {type(self).model_fields[name].description}")
        judged = [name for name in SOURCES if SOURCES[name].judge == self.judge]
        if judged and self.source not in judged:
            raise ValueError(
                f"judge: {self.judge} can score source: {' or '.join(judged)} alone, got source: {self.source}. Use "
                "judge: server or judge: local."
            )
        scores_coherence = JUDGES[self.judge].scores_coherence
        if self.coherence_judge and scores_coherence:
            raise ValueError(f"judge: {self.judge} scores coherence itself; leave coherence_judge out.")
        if self.coherence_judge and not JUDGES[self.coherence_judge].scores_coherence:
            raise ValueError(f"coherence_judge: {self.coherence_judge} scores no coherence; name another.")
        if not scores_coherence and not self.coherence_judge and self.min_coherence_score > 0:
            raise ValueError(
                f"judge: {self.judge} scores no coherence. Name a coherence_judge, or set min_coherence_score: 0 to "
                "keep completions without that score."
            )
        for name in source.no_choice:
            field = type(self).model_fields.get(name)
            if field is not None and getattr(self, name) != field.default:
                raise ValueError(f"source: {self.source} has no choice of {name}; leave it out.")
        return self

    @property
    def model_judge(self) -> str | None:
        """The judge, or judge of coherence, that asks a language model: "server", "local", or `None` if none does."""
        asked = (name for name in (self.judge, self.coherence_judge) if name and JUDGES[name].needs_model)
        return next(asked, None)

    @property
    def judge_at_server(self) -> bool:
        """Whether that language model is on a server."""
        return self.model_judge is not None and JUDGES[self.model_judge].at_server

    @property
    def judge_server(self) -> str | None:
        """The URL of that server."""
        return self.judge_url

    @property
    def filter(self) -> FilterSettings:
        """The thresholds."""
        return FilterSettings(self.min_trait_score, self.min_coherence_score, self.max_similarity)


class Recipe(DrawFields):
    """What a run draws, on which model, who judges it and what is kept. Each field is an option of `psr triplets` too.

    Fields that may change between the starts of one run say so in their `json_schema_extra`.
    """

    model: Place = Field(
        min_length=1,
        description="Hub name or folder, or its name on the server; 'embedded' is the one in the package.",
    )
    split: Split = Field("train", description="Which of the source's questions.")
    negatives: bool = Field(
        False, description="Draw on the instructions that ask for the opposite too, into negatives.jsonl."
    )
    sampler: Literal["local", "server"] = Field(
        "local", description="Draw with transformers here, or ask an OpenAI-compatible server."
    )
    server_url: Url | None = Field(
        None, description="Such as http://localhost:8000/v1, for sampler: server.", json_schema_extra=FREE
    )
    server_key_variable: VariableName = Field(
        "OPENAI_API_KEY",
        description="Environment variable with the server's key, if it wants one.",
        json_schema_extra=FREE,
    )
    server_fields: dict[str, Any] = Field({}, description='More fields of each request: {"top_k": -1}, say.')

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        if self.sampler == "server" and not self.server_url:
            raise ValueError(f"sampler: server needs server_url: {type(self).model_fields['server_url'].description}")
        if self.judge_at_server and not self.judge_server:
            raise ValueError(
                f"A judge that is {self.model_judge} needs judge_url (or a server_url, which the judge then shares)."
            )
        if self.negatives and not SOURCES[self.source].has_negatives:
            raise ValueError(f"source: {self.source} has no instructions for the opposite; leave negatives out.")
        if self.sampler == "server" and self.chat_template:
            raise ValueError("chat_template is for a model that is drawn from here; a server has its own.")
        own = self.server_fields.get("chat_template_kwargs", {})
        if self.sampler == "server" and self.template_args and own and own != self.template_args:
            raise ValueError(
                f"template_args: {self.template_args} and server_fields say different things of the chat template "
                f"(chat_template_kwargs: {own}); give template_args alone."
            )
        if self.sampler == "server" and self.model == EMBEDDED:
            raise ValueError("model: embedded is drawn from here (sampler: local); name the model as the server does.")
        return self

    @property
    def judge_server(self) -> str | None:
        """The judge's server, by default that of the sampler."""
        return self.judge_url or self.server_url

    @property
    def selection(self) -> Selection:
        """What is wanted of the source; a trait that is named twice, once."""
        wanted = {field.name: getattr(self, field.name) for field in fields(Selection)}
        return Selection(**{**wanted, "traits": tuple(dict.fromkeys(self.traits))})

    @property
    def request_fields(self) -> dict[str, Any]:
        """What each request to the sampler's server holds besides: `server_fields`, and the template's arguments."""
        named = {"chat_template_kwargs": self.template_args} if self.template_args else {}
        return {**self.server_fields, **named}


def load_recipe(recipe: str | Path | None, options: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and checks a recipe, one that ships or a file; see `read_recipe`."""
    return read_recipe(Recipe, recipe, options, shipped_recipes())


def shipped_recipes() -> dict[str, Path]:
    """Returns {name: file} of the recipes in the package."""
    return yaml_files(Path(__file__).parent / "recipes")
