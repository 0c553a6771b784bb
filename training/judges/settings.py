"""What judges are made of, as given by a recipe or by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_psr.training.data.draws import PromptPair

from .prompts import COHERENCE_PROMPT


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_psr.training.sampling.chat_server import ChatServer


@dataclass(frozen=True)
class JudgeSettings:
    """What a judge may be made of; each takes what it needs."""

    pairs: Sequence[PromptPair] = ()  # All that it may be asked about
    cache: Path = Path("judge_answers.sqlite")  # file that keeps a language model's answers
    # {trait: what is asked for its score}, of the traits that have such a prompt of their own
    trait_prompts: Mapping[str, str] = field(default_factory=dict)
    coherence_prompt: str = COHERENCE_PROMPT  # what is asked for coherence
    coherence_judge: str | None = None  # who scores coherence for a judge that does not, by name
    model: str = ""  # the language model that judges: Hub name, folder or 'embedded', or its name on a server
    revision: str | None = None  # branch, tag or commit on the Hub
    dtype: str = "auto"  # of the weights of a model here
    device_map: str | None = None  # where accelerate puts a model here
    trust_remote_code: bool = False  # run code that comes with a model on the Hub
    batch_size: int = 16  # most questions that a model here reads together
    url: str = ""  # the model's server
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the server's key
    fields: Mapping[str, Any] = field(default_factory=dict)  # more fields of each request to the server
    concurrency: int = 32  # requests in flight at the server
    timeout: float = 120.0  # seconds until a request is tried again
    max_failure_share: float = 0.1  # the judge gives up when more than this share of its requests fails for good

    def server(self) -> ChatServer:
        """The model on its server; nothing is sent yet. Raises `ValueError` if a setting is wrong."""
        from peft_psr.training.sampling.chat_server import ChatServer

        return ChatServer(
            self.url,
            self.model,
            api_key_variable=self.key_variable,
            concurrency=self.concurrency,
            timeout=self.timeout,
            max_failure_share=self.max_failure_share,
            extra_body=self.fields,
        )

    def load_model(self) -> PreTrainedModel:
        """The model, here and in eval mode; one judge is in memory at a time, whatever asks for it.

        Raises as `peft_psr.base_model.loading.load_model`.
        """
        return _model(self.model, self.revision, self.dtype, self.device_map, self.trust_remote_code)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with its own chat template; raises as `peft_psr.base_model.loading` does."""
        return _tokenizer(self.model, self.revision, self.trust_remote_code)


@lru_cache(maxsize=1)
def _model(name: str, revision: str | None, dtype: str, device_map: str | None, trust: bool) -> Any:
    from peft_psr.base_model.loading import load_model

    return load_model(name, revision, dtype=dtype, device_map=device_map, trust_remote_code=trust)


@lru_cache(maxsize=1)
def _tokenizer(name: str, revision: str | None, trust: bool) -> Any:
    from peft_psr.base_model.loading import load_tokenizer

    return load_tokenizer(name, revision, trust_remote_code=trust)
