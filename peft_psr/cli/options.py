"""What every command is given and how: a model of its options, read from a recipe, `--config`, flags; checked there.

Flags win over the file of `--config`, which wins over a recipe. All three are put together before they are checked by
`read_recipe`, so that a wrong value is worded in one way wherever it stands.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic.fields import FieldInfo

from peft_psr.prompts.chat_template import check_template_args
from peft_psr.training.runs.recipe_fields import ModelFields, RecipeFields, in_words, read_recipe
from peft_psr.training.runs.yaml_reading import read_yaml

from .common import errors, home, plain_console


ARGUMENT: dict[str, Any] = {"argument": True}
"""As a field's `json_schema_extra`: it is given by its place, not by a flag."""

Folder = Annotated[Path, AfterValidator(home)]
Adapters = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
    AfterValidator(lambda given: tuple(map(home, given))),
]
Seed = Annotated[int, Field(ge=0)]

Options = TypeVar("Options", bound=RecipeFields)
Recipe = TypeVar("Recipe", bound=RecipeFields)


class CommandOptions(RecipeFields):
    """What every command takes, besides `--config`."""

    dry_run: bool = Field(False, description="Check everything, say what would be done, do nothing.")


class RunOptions(CommandOptions):
    """What a command takes besides the fields of its recipe."""

    recipe: str | None = Field(
        None,
        json_schema_extra=ARGUMENT,
        description="A YAML file, or the name of a recipe that ships (see `psr recipes`).",
    )
    output: Folder = Field(description="A new folder, or one that the same recipe's run has left.")


class SteeredOptions(ModelFields, CommandOptions):
    """What a command takes that loads a model with adapters."""

    adapters: Adapters = Field(
        json_schema_extra=ARGUMENT, description="Folders or Hub names of adapters, or NAME=FOLDER to name one."
    )
    model: Annotated[str, AfterValidator(home)] = Field(
        "", description="Folder or Hub name of the base model; the adapters' own by default."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of the base model; the adapters' own by default."
    )
    template_args: dict[str, Any] | None = Field(
        None, description='Arguments of the chat template: {"enable_thinking": false}; the adapters\' own by default.'
    )

    @field_validator("template_args")
    @classmethod
    def _can_be_arguments(cls, template_args: dict[str, Any] | None) -> dict[str, Any] | None:
        check_template_args(template_args or {})
        return template_args  # an empty object stands for none, in place of the adapters'

    def tokenizer_settings_for(self, adapters: Mapping[str, str]) -> dict[str, Any]:
        """What `peft_psr.base_model.loading.load_tokenizer` is given; raises as `template_args_for`."""
        from peft_psr.hub.steered_model import template_args_for

        return {**self.tokenizer_settings, "template_args": template_args_for(adapters, self.template_args)}


def command(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command of a function that takes these options."""

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        def parsed(**flags: Any) -> None:
            with errors(plain_console()):
                chosen = read_recipe(options, None, _given(flags), {})
            run(chosen)

        return _described(parsed, run, options)

    return decorate


def recipe_command(
    recipe: type[Recipe], load: Callable[[str | None, dict[str, Any]], Recipe]
) -> Callable[[Callable[[Recipe, RunOptions], None]], Callable[..., None]]:
    """Make a command of a function that takes a recipe, whose fields are options too, and `RunOptions`."""

    def decorate(run: Callable[[Recipe, RunOptions], None]) -> Callable[..., None]:
        def parsed(**flags: Any) -> None:
            with errors(plain_console()):
                given = _given(flags)
                own = {name: given.pop(name) for name in RunOptions.model_fields if name in given}
                options = read_recipe(RunOptions, None, own, {})
                chosen = load(options.recipe, given)
            run(chosen, options)

        return _described(parsed, run, RunOptions, recipe)

    return decorate


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The options in a file, if there is one, and the flags, which win."""
    path = flags.pop("config")
    read = {} if path is None else _read(home(path))
    return read | {name: value for name, value in flags.items() if value not in (None, [], ())}


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path} must hold options such as 'seed: 1', got {type(content).__name__}.")
    options: dict[str, Any] = {}
    for written, value in (content or {}).items():
        name = str(written).replace("-", "_")
        if name in options:
            raise ValueError(f"{path} gives {name} twice, written in two ways; leave one out.")
        options[name] = value
    return options


def _described(
    parsed: Callable[..., None], run: Callable[..., None], *kinds: type[RecipeFields]
) -> Callable[..., None]:
    """The command's name, help and parameters, for typer; it knows texts and switches alone, the models the rest."""
    fields = {name: (kind, field) for kind in kinds for name, field in kind.model_fields.items()}
    file = typer.Option(None, metavar="FILE", help="YAML file with any of these options.")
    parameters = [_parameter("config", file, Path | None)]
    for name, (kind, field) in fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        about = f"{field.description} ({in_words(kind, name)}{_default(field)})"
        several = extra.get("argument") and field.annotation not in (str, str | None, Path)
        annotation: Any = list[str] | None if several else bool | None if field.annotation is bool else str | None
        if extra.get("argument"):
            given = typer.Argument(None, help=about)
        else:
            metavar = None if annotation == bool | None else "VALUE"
            given = typer.Option(None, *cast(list[str], extra.get("flags", [])), help=about, metavar=metavar)
        parameters.append(_parameter(name, given, annotation))
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__name__, parsed.__doc__ = run.__name__, run.__doc__
    return parsed


def _parameter(name: str, given: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=annotation)


def _default(field: FieldInfo) -> str:
    """In words, unless the description says it."""
    default = field.default
    if field.is_required():
        return "; needed"
    if default is None or isinstance(default, bool) or default in ("", (), {}):
        return ""
    return f"; default: {', '.join(map(str, default)) if isinstance(default, tuple) else default}"
