"""Fields of every recipe that names a model which is loaded here: how its prompts are rendered, whose code it runs."""

from typing import Any

from pydantic import Field, field_validator

from peft_psr.prompts.chat_template import check_template_args, read_chat_template
from peft_psr.training.data.draws import template_hash

from .recipe_fields import FREE, Place, RecipeFields


class ModelFields(RecipeFields):
    """What decides, beside the model's name, how it is loaded and how it sees a conversation."""

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

        Raises:
            OSError, ValueError: as `peft_psr.prompts.chat_template.read_chat_template`.
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
