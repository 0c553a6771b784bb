"""A language model that runs here as a judge, with the score of METHOD 6 from its logits (`number_scores`)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from peft_psr.prompts.conversations import encode_prompt
from peft_psr.training.data.draws import Failure, Sampler

from .answer_cache import AnswerCache
from .answer_score import Scored
from .language_model import LLMJudge
from .prompts import COHERENCE_PROMPT, TRAIT_PROMPT
from .settings import JudgeSettings


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalJudge(LLMJudge):
    """A judge that runs here, on any causal language model with a chat template.

    Args:
        model: The judging model, on the device where it is to run.
        processing_class: Its tokenizer.
        trait, trait_prompt, coherence_prompt: As for every `LLMJudge`.
        cache: Likewise. A model is known there by its name and a sample of its weights.
        batch_size: Questions read together; those of similar length go together.

    Raises:
        ValueError: as every `LLMJudge`; a tokenizer without a chat template or without numbers; `batch_size` below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        trait: str = "",
        trait_prompt: str = TRAIT_PROMPT,
        coherence_prompt: str = COHERENCE_PROMPT,
        cache: AnswerCache | None = None,
        batch_size: int = 16,
    ) -> None:
        from .number_scores import ANSWER_TOKENS, model_identity, number_tokens

        super().__init__(trait, trait_prompt, coherence_prompt, cache)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model, self.processing_class, self.batch_size = model, processing_class, batch_size
        self.numbers = number_tokens(processing_class)
        self.identity = model_identity(model, processing_class)
        single = all(len(tokens) == 1 for tokens in self.numbers.values())
        self.parameters = {"numbers": "single tokens" if single else "several tokens", "answer_tokens": ANSWER_TOKENS}

    @classmethod
    def connect(cls, given: JudgeSettings) -> Callable[..., LocalJudge]:
        """See `LLMJudge.connect`; the model is loaded when the first judge is made, whether it can judge shows now."""
        from .number_scores import number_tokens

        number_tokens(given.load_tokenizer())
        return lambda **prompts: cls(
            given.load_model(), given.load_tokenizer(), **prompts, batch_size=given.batch_size
        )

    @classmethod
    def sampler(cls, given: JudgeSettings, max_new_tokens: int) -> Sampler:
        """See `LLMJudge.sampler`."""
        from peft_psr.training.sampling.local import LocalSampler

        return LocalSampler(
            given.load_model(), given.load_tokenizer(), max_new_tokens, 0.0, given.batch_size, name=given.model
        )

    def _description(self) -> dict[str, Any]:
        return {"engine": "transformers", **self.identity, **self.parameters}

    def _ask(self, texts: list[str]) -> Generator[dict[str, dict[str, Any] | Failure]]:
        from .number_scores import read_scores

        ids = [encode_prompt(self.processing_class, [{"role": "user", "content": text}]) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            scores = read_scores(self.model, self.processing_class, [ids[i] for i in rows], self.numbers)
            self.usage["calls"] += len(rows)
            self.usage["prompt_tokens"] += sum(len(ids[i]) for i in rows)
            yield {texts[i]: {"score": score} for i, score in zip(rows, scores, strict=True)}

    def _read(self, reply: dict[str, Any]) -> Scored:
        return Scored(reply["score"], "log-probabilities")
