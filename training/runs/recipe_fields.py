"""What recipes of every kind share: YAML files whose fields are checked one by one and explained in words."""

import difflib
import json
import os
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from peft_psr.files import digest
from peft_psr.prompts.chat_template import check_template_args, read_chat_template
from peft_psr.registry import Registry
from peft_psr.text import composed
from peft_psr.training.data.draws import template_hash

from .yaml_reading import parse_yaml, read_yaml


FREE: dict[str, Any] = {"may_change": True}
"""As a field's `json_schema_extra`: it may change between the starts of one run."""


def split(value: Any) -> Any:
    """Items in one text, as a flag gives them, parted by commas."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(split)]
TraitNames = Annotated[Names, AfterValidator(lambda names: tuple(map(composed, names)))]
"""Names in one Unicode form, as traits have them: macOS and some keyboards write an accent as a letter of its own."""
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file, a folder, or a name on the Hub; `~` is the user's folder, as in a shell."""
Places = Annotated[Names, AfterValidator(lambda places: tuple(map(os.path.expanduser, places)))]


@dataclass(frozen=True)
class Registered:
    """The name of what is in a registry when a recipe is read: `Annotated[str, Registered(SOURCES)]`."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The text's schema, with the registry's check."""
        return core_schema.no_info_after_validator_function(self.registry.check, handler(source))


class RecipeFields(BaseModel):
    """The base of a recipe: unknown fields are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, values: Any) -> Any:
        """From the command line, `none` is YAML's null where null is accepted, and lists and mappings are texts."""
        if not isinstance(values, Mapping):
            return values
        for name, value in values.items():
            # pydantic would take YAML's yes and no for 1 and 0
            if isinstance(value, bool) and name in cls.model_fields and bool not in _bare_kinds(cls, name):
                raise ValueError(_wrong(cls, name, value))
        return {
            name: _from_text(name, value, _bare_kinds(cls, name)) if name in cls.model_fields else value
            for name, value in values.items()
        }

    def fixed(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON; a run goes on only if they are equal."""
        free = {name for name, field in type(self).model_fields.items() if field.json_schema_extra == FREE}
        return self.model_dump(mode="json", exclude=free)

    def fixed_hash(self) -> str:
        """SHA-256 of `fixed()`."""
        return digest(self.fixed())


class ModelFields(RecipeFields):
    """How a recipe's model, where it is loaded here, renders prompts, and whether code that comes with it is run."""

    if TYPE_CHECKING:  # each kind of recipe describes them in words of its own
        revision: str | None
        dtype: str

    chat_template: Place | None = Field(
        None, description="File with a chat template, for models without one or in place of their own."
    )
    template_args: dict[str, Any] | None = Field(
        None, description='Arguments of the chat template: {"enable_thinking": false}, say.'
    )
    trust_remote_code: bool = Field(
        False, json_schema_extra=FREE, description="Run code that comes with a model on the Hub."
    )

    @field_validator("template_args")
    @classmethod
    def _can_be_arguments(cls, template_args: dict[str, Any] | None) -> dict[str, Any] | None:
        check_template_args(template_args or {})
        return template_args or None

    def fixed(self) -> dict[str, Any]:
        """The fields that decide the result; of the chat template's file its hash: the file may move, and may change.

        Raises as `read_chat_template`.
        """
        if self.chat_template is None:
            return super().fixed()
        return super().fixed() | {"chat_template": template_hash(read_chat_template(self.chat_template))}

    @property
    def tokenizer_settings(self) -> dict[str, Any]:
        """What `peft_psr.base_model.loading.load_tokenizer` is given beside the model's name and revision."""
        return {
            "chat_template": self.chat_template,
            "template_args": self.template_args,
            "trust_remote_code": self.trust_remote_code,
        }


def _from_text(name: str, value: Any, kinds: Sequence[Any]) -> Any:
    if not isinstance(value, str):
        return value
    if value in ("none", "null") and type(None) in kinds:
        return None
    if value[:1] in ("[", "{") and str not in kinds:
        try:
            return json.loads(value, object_pairs_hook=partial(_each_once, name))  # YAML takes 1e-3 for a text
        except json.JSONDecodeError:
            with suppress(ValueError):
                return parse_yaml(value, name)
    return value


def _each_once(field: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which may not name a thing twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = ", ".join(name for name, _ in pairs)
        raise ValueError(f"{field}: a key comes twice ({keys}); leave one of the two out.")
    return found


Kind = TypeVar("Kind", bound=RecipeFields)


def read_recipe(
    kind: type[Kind], recipe: str | Path | None, options: Mapping[str, Any] | None, shipped: Mapping[str, Path]
) -> Kind:
    """Reads and checks a recipe.

    Args:
        kind: What it describes.
        recipe: A YAML file, or the name of a recipe that ships; `None` if `options` say everything.
        options: Fields that go before those of the file.
        shipped: {name: file} of those that ship.

    Raises:
        FileNotFoundError: no such file and no such recipe.
        ValueError: the file is no YAML mapping, or a field is wrong; the message names each wrong field, the value and
            what is accepted.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        path = _find(recipe, shipped)
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold fields such as 'seed: 1', got {type(content).__name__}.")
        values = {str(name): value for name, value in content.items()}
    values.update(options or {})
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # a field that takes one of several kinds has a problem with each of them
        problems = {problem["loc"][:1]: problem for problem in reversed(error.errors())}
        lines = [_explain(kind, problem, values) for problem in reversed(problems.values())]
        raise ValueError(f"{recipe or 'the options'}: " + "\n".join(lines)) from None


def yaml_files(folder: Path) -> dict[str, Path]:
    """Returns {name: file} of the recipes in a folder."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _find(recipe: str | Path, shipped: Mapping[str, Path]) -> Path:
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = Path(os.path.expanduser(recipe))
    if not path.is_file():
        raise FileNotFoundError(
            f"No recipe file {str(path)!r}, and none of that name ships; there are: {', '.join(shipped)}."
        )
    return path


def _explain(kind: type[RecipeFields], problem: Any, values: Mapping[str, Any]) -> str:
    """One wrong field: its name, the value, what is accepted."""
    where = problem["loc"]
    if not where:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(where[0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        fields = ", ".join(kind.model_fields)
        return f"unknown field {name} (value {problem['input']!r}).{hint} The fields are {fields}."
    about = _accepted(kind, name)
    if problem["type"] == "missing":
        return f"{name} is missing; accepted: {about}"
    own = str(problem["msg"]).removeprefix("Value error, ")
    if own.startswith(f"{name}: "):
        return own
    if name.endswith("_url"):  # it may hold a password
        return f"{name} must look like http://localhost:8000/v1, without user name, password or query. {about}"
    if name.endswith("key_variable"):  # it may be the key itself, put in the wrong place
        return f"{name} must be the name of an environment variable, in capitals. {about}"
    return _wrong(kind, name, values[name])


def _accepted(kind: type[RecipeFields], name: str) -> str:
    return f"{in_words(kind, name)}. {kind.model_fields[name].description}"


def _wrong(kind: type[RecipeFields], name: str, value: Any) -> str:
    hint = ""
    if str in _bare_kinds(kind, name) and value is not None and not isinstance(value, (str, list, dict)):
        hint = " In YAML, a text that looks like a number, a date, yes or no is put in quotes."
    return f"{name}: {value!r} is wrong; accepted: {_accepted(kind, name)}{hint}"


def in_words(kind: type[RecipeFields], name: str) -> str:
    """What a field takes: `a whole number, at least 1`, `local | server`, ..."""
    field = kind.model_fields[name]
    return " | ".join(_kind_in_words(part, field.metadata) for part in _kinds(field.annotation))


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """What a union is of; anything else by itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _bare_kinds(kind: type[RecipeFields], name: str) -> list[Any]:
    """What a field may be, without constraints; `Registered` for a registry's names."""
    field = kind.model_fields[name]
    return [
        _names_in(part, field.metadata) or (get_args(part)[0] if get_origin(part) is Annotated else part)
        for part in _kinds(field.annotation)
    ]


def _names_in(kind: Any, constraints: Sequence[Any]) -> Registered | None:
    """The registry that a text has to be a name of, if any."""
    own = get_args(kind)[1:] if get_origin(kind) is Annotated else constraints if kind is str else ()
    return next((constraint for constraint in own if isinstance(constraint, Registered)), None)


def _kind_in_words(kind: Any, constraints: Sequence[Any]) -> str:
    names = _names_in(kind, constraints)
    if names is not None:
        return " | ".join(names.registry)
    if get_origin(kind) is Annotated:
        kind, *own = get_args(kind)
        constraints = [*constraints, *(c for field in own for c in getattr(field, "metadata", []))]
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is dict:
        return "a JSON object"
    if get_origin(kind) is tuple and get_args(kind)[0] is not str:
        item = get_args(kind)[0]
        whole = (get_args(item)[0] if get_origin(item) is Annotated else item) is int
        return "a list of whole numbers" if whole else "a list of numbers"
    if kind not in (int, float):
        words = {str: "text", Path: "a path", bool: "true | false", type(None): "none"}
        return words.get(kind, "a list of names")
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{text} {getattr(constraint, bound):g}"
        for constraint in constraints
        for bound, text in bounds.items()
        if getattr(constraint, bound, None) is not None
    ]
    return ", ".join(["a whole number" if kind is int else "a number", *limits])
