"""Recipes: one YAML file that describes a run of `psr triplets`, checked field by field before anything is loaded.

Those that ship are in `recipes/` beside this file; `shipped_recipes` lists them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .filtering import FilterSettings


EMBEDDED = "embedded"
"""As a model's name: the one in the package; as a source of traits: its grammar."""

Url = Annotated[str, Field(pattern=r"^https?://[^@?\s]+$")]
VariableName = Annotated[str, Field(pattern="^[A-Z_][A-Z0-9_]*$")]
Count = Annotated[int, Field(ge=1)]
Score = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
RequestFields = Annotated[dict[str, Any], BeforeValidator(lambda value: _object(value))]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: _split(value))]

_FREE: dict[str, Any] = {"may_change": True}  # the field may change between the starts of one run


def _split(value: Any) -> Any:
    """Names in one text, as a flag gives them, parted by commas."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _object(value: Any) -> Any:
    """A JSON object in a text, as a flag gives it."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


class Recipe(BaseModel):
    """What a run draws, on which model, who judges it and what is kept. Each field is an option of `psr triplets` too.

    Fields that may change between the starts of one run (they decide how fast, how stubbornly, and what is kept, but
    not what is drawn and judged) say so in their `json_schema_extra`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field("", description="One line that `psr recipes` shows.", json_schema_extra=_FREE)

    source: Literal["embedded", "personas", "ifeval", "axbench"] = Field(
        description="Where traits and questions come from: the embedded model's grammar, trait files in the Persona "
        "Vectors layout, IFEval's pairs of prompts, AxBench's concepts."
    )
    data: str | None = Field(
        None, description="File, folder or Hub data set of the source; for personas, the traits that ship by default."
    )
    data_revision: str | None = Field(None, description="Branch, tag or commit of a data set on the Hub.")
    traits: Names = Field((), description="Traits or concepts by name, with commas between them; all by default.")
    split: Literal["train", "test"] = Field("train", description="Which of the source's questions.")
    instructions: Count | None = Field(None, description="At most so many instructions a trait; all by default.")
    questions: Count | None = Field(None, description="At most so many questions a trait; all by default.")
    draws: Count = Field(10, description="Completions for each instruction and question.")
    placement: Literal["system", "before", "after"] = Field(
        "system", description="Where the instruction stands: in the system turn, before the user's text, or after it."
    )
    negatives: bool = Field(
        False, description="Draw on the instructions that ask for the opposite too, into negatives.jsonl."
    )
    seed: int = Field(0, ge=0, description="Every draw's own seed follows from it.")

    model: str = Field(
        min_length=1,
        description="Hub name or folder, or its name on the server; 'embedded' is the one in the package.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Of a local model.")
    device_map: str = Field(
        "auto", description="Where accelerate puts a local model: auto, cpu, cuda:1, ...", json_schema_extra=_FREE
    )
    sampler: Literal["local", "server"] = Field(
        "local", description="Draw with transformers here, or ask an OpenAI-compatible server."
    )
    max_new_tokens: Count = Field(256, description="Longest completion, in tokens.")
    temperature: float = Field(1.0, ge=0, description="Of the sampling; 0 takes the likeliest token.")
    batch_size: Count = Field(
        64, description="Most completions drawn together here; halved when memory runs out.", json_schema_extra=_FREE
    )
    server_url: Url | None = Field(
        None, description="Such as http://localhost:8000/v1, for sampler: server.", json_schema_extra=_FREE
    )
    server_key_variable: VariableName = Field(
        "OPENAI_API_KEY", description="Environment variable with the server's key, if it wants one.",
        json_schema_extra=_FREE,
    )  # fmt: skip
    server_fields: RequestFields = Field(
        {}, description='More fields of each request: {"chat_template_kwargs": {"enable_thinking": false}}, say.'
    )
    concurrency: Count = Field(32, description="Requests in flight at a server.", json_schema_extra=_FREE)
    timeout: float = Field(120.0, gt=0, description="Seconds until a request is tried again.", json_schema_extra=_FREE)
    max_failure_share: Share = Field(
        0.1,
        description="A run stops when more than this share of its requests fails for good.",
        json_schema_extra=_FREE,
    )

    judge: Literal["grammar", "ifeval", "server", "local"] = Field(
        description="Who scores: the embedded model's grammar, IFEval's checkers, a model on a server, a model here."
    )
    coherence_judge: Literal["server", "local"] | None = Field(
        None, description="Who scores coherence for judge: ifeval, whose checkers don't."
    )
    judge_model: str | None = Field(None, description="The model of a judge that is server or local.")
    judge_revision: str | None = Field(None, description="Its revision on the Hub, for a local judge.")
    judge_url: Url | None = Field(
        None, description="The judge's server; that of the sampler by default.", json_schema_extra=_FREE
    )
    judge_key_variable: VariableName = Field(
        "OPENAI_API_KEY", description="Environment variable with the judge server's key, if it wants one.",
        json_schema_extra=_FREE,
    )  # fmt: skip
    judge_fields: RequestFields = Field({}, description="More fields of each request to the judge's server.")
    judge_batch_size: Count = Field(
        16, description="Most questions that a local judge reads together.", json_schema_extra=_FREE
    )
    judge_cache: str | None = Field(
        None,
        description="File that keeps a judge's answers, for other runs too; in the run's folder by default.",
        json_schema_extra=_FREE,
    )
    trait_prompt: str | None = Field(None, description="File with a trait prompt for the judge, in place of its own.")
    coherence_prompt: str | None = Field(None, description="File with a coherence prompt for the judge.")

    min_trait_score: Score = Field(
        50.0, description="A triplet needs as much, a negative less.", json_schema_extra=_FREE
    )
    min_coherence_score: Score = Field(
        50.0, description="Every completion kept needs as much.", json_schema_extra=_FREE
    )
    max_similarity: float | None = Field(
        0.9, gt=0, le=1, json_schema_extra=_FREE,
        description="Of two completions on one prompt that are at least so similar, the second is dropped; 1: only "
        "equal ones; none: none.",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _none(cls, values: Any) -> Any:
        """`none` on the command line is YAML's null."""
        if not isinstance(values, Mapping):
            return values
        return {name: None if value in ("none", "null") else value for name, value in values.items()}

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        needs = {
            "server_url": self.sampler == "server" and "sampler: server",
            "judge_model": self.model_judge is not None and f"a judge that is {self.model_judge}",
            "data": self.source in ("ifeval", "axbench") and f"source: {self.source}",
        }
        for name, reason in needs.items():
            if reason and not getattr(self, name):
                raise ValueError(f"{reason} needs {name}: {type(self).model_fields[name].description}")
        if self.model_judge == "server" and not (self.judge_url or self.server_url):
            raise ValueError("A judge that is server needs judge_url (or a server_url, which the judge then shares).")
        for judge, source in {"grammar": "embedded", "ifeval": "ifeval"}.items():
            if self.judge == judge and self.source != source:
                raise ValueError(
                    f"judge: {judge} can score source: {source} alone, got source: {self.source}. Use judge: server "
                    "or judge: local."
                )
        if self.coherence_judge and self.judge != "ifeval":
            raise ValueError(f"judge: {self.judge} scores coherence itself; leave coherence_judge out.")
        if self.judge == "ifeval" and not self.coherence_judge and self.min_coherence_score > 0:
            raise ValueError(
                "judge: ifeval scores no coherence. Name a coherence_judge, or set min_coherence_score: 0 to keep "
                "completions without that score."
            )
        own = {"ifeval": ("instructions", "placement", "split"), "axbench": ("instructions", "split")}
        for name in own.get(self.source, ()):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"source: {self.source} has no choice of {name}; leave it out.")
        if self.negatives and self.source != "personas":
            raise ValueError(f"source: {self.source} has no instructions for the opposite; leave negatives out.")
        if self.sampler == "server" and self.model == EMBEDDED:
            raise ValueError("model: embedded is drawn from here (sampler: local); name the model as the server does.")
        return self

    @property
    def model_judge(self) -> str | None:
        """Where the language model runs that judges or helps to: "server", "local", or `None` if there is none."""
        return self.coherence_judge if self.judge == "ifeval" else self.judge if self.judge != "grammar" else None

    @property
    def filter(self) -> FilterSettings:
        """The thresholds."""
        return FilterSettings(self.min_trait_score, self.min_coherence_score, self.max_similarity)

    def fixed(self) -> dict[str, Any]:
        """The fields that decide what is drawn and judged, as JSON; a run goes on only if they are equal."""
        free = {name for name, field in type(self).model_fields.items() if field.json_schema_extra == _FREE}
        return self.model_dump(mode="json", exclude=free)

    def fixed_hash(self) -> str:
        """SHA-256 of `fixed()`."""
        return hashlib.sha256(json.dumps(self.fixed(), sort_keys=True).encode()).hexdigest()


def load_recipe(recipe: str | Path | None, options: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        recipe: A YAML file, or the name of a recipe that ships; `None` if `options` say everything.
        options: Fields that go before those of the file.

    Raises:
        FileNotFoundError: no such file and no such recipe.
        ValueError: the file is no YAML mapping, or a field is wrong; the message names each wrong field, the value and
            what is accepted.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        path = _find(recipe)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold fields such as 'seed: 1', got {type(content).__name__}.")
        values = {str(name): value for name, value in content.items()}
    values.update(options or {})
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ValueError(f"{recipe or 'the options'}: " + "\n".join(lines)) from None


def shipped_recipes() -> dict[str, Path]:
    """Returns {name: file} of the recipes in the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = Path(recipe)
    if not path.is_file():
        raise FileNotFoundError(f"No recipe file {str(path)!r}, and none of that name ships; there are: "
                                f"{', '.join(shipped)}.")  # fmt: skip
    return path


def _explain(problem: Any) -> str:
    """One wrong field: its name, the value, what is accepted."""
    where = problem["loc"]
    if not where:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(where[0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Recipe.model_fields, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        fields = ", ".join(Recipe.model_fields)
        return f"unknown field {name} (value {problem['input']!r}).{hint} The fields are {fields}."
    about = f"{accepted(name)}. {Recipe.model_fields[name].description}"
    if problem["type"] == "missing":
        return f"{name} is missing; accepted: {about}"
    if name.endswith("_url"):  # it may hold a password
        return f"{name} must look like http://localhost:8000/v1, without user name, password or query. {about}"
    if name.endswith("key_variable"):  # it may be the key itself, put in the wrong place
        return f"{name} must be the name of an environment variable, in capitals. {about}"
    return f"{name}: {problem['input']!r} is wrong; accepted: {about}"


def accepted(name: str) -> str:
    """What a field of `Recipe` takes, in words: `a whole number, at least 1`, `local | server`, ..."""
    field = Recipe.model_fields[name]
    annotation = field.annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return " | ".join(_in_words(part, field.metadata) for part in parts)


def _in_words(kind: Any, constraints: Sequence[Any]) -> str:
    if get_origin(kind) is Annotated:
        kind, *own = get_args(kind)
        constraints = [*constraints, *(constraint for field in own for constraint in getattr(field, "metadata", []))]
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is dict:
        return "a JSON object"
    if kind not in (int, float):
        return {str: "text", bool: "true | false", type(None): "none"}.get(kind, "a list of names")
    bounds = {"ge": "at least", "gt": "above", "le": "at most"}
    limits = [
        f"{text} {getattr(constraint, bound):g}"
        for constraint in constraints
        for bound, text in bounds.items()
        if getattr(constraint, bound, None) is not None
    ]
    return ", ".join(["a whole number" if kind is int else "a number", *limits])
