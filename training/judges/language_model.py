"""A language model as a judge: each completion is graded twice, for the trait and for coherence.

`ServerJudge` asks an OpenAI-compatible server, `LocalJudge` a transformers model. Answers are cached by what was
asked, so that a rerun asks nothing.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, ClassVar

from peft_psr.prompts.conversations import Prompt, prompt_text
from peft_psr.training.data.draws import Failure, PromptPair, Sampler

from .answer_cache import AnswerCache, answer_key, ask_once
from .answer_score import Scored
from .base import Judge, JudgeScores
from .prompts import COHERENCE_PROMPT, TRAIT_PROMPT, fill_prompt
from .settings import JudgeSettings


class LLMJudge(Judge):
    """Grades completions with a language model; a subclass sets what the cache knows it by.

    Attributes:
        identity: What stands for the model in the cache.
        parameters: How it is asked, for the cache.
    """

    needs_model: ClassVar[bool] = True
    identity: dict[str, Any]
    parameters: dict[str, Any]

    def __init__(
        self,
        trait: str = "",
        trait_prompt: str = TRAIT_PROMPT,
        coherence_prompt: str = COHERENCE_PROMPT,
        cache: AnswerCache | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            trait: A short description, put for `{trait}`; may be empty if the prompt does not ask for it.
            trait_prompt: Asks for a number 0-100; `{question}` and `{answer}` are filled in.
            coherence_prompt: The same for coherence.
            cache: Where answers are kept; without one, a run that stops loses those of the present call.

        Raises:
            ValueError: a prompt without `{answer}`, or `{trait}` in it and no trait given.
        """
        for name, template in {"trait_prompt": trait_prompt, "coherence_prompt": coherence_prompt}.items():
            if "{answer}" not in template:
                raise ValueError(f"{name} must hold {{answer}}, where the completion goes; got {template[:80]!r}.")
        if "{trait}" in trait_prompt and not trait:
            raise ValueError("trait_prompt asks for {trait}: give `trait`, a short description of it.")
        self.templates = {"trait": fill_prompt(trait_prompt, trait=trait), "coherence": coherence_prompt}
        self.cache = cache
        self._sources: Counter[str] = Counter()

    @classmethod
    def maker(cls, given: JudgeSettings) -> Callable[[str], Judge]:
        """See `Judge.maker`; a judge of no trait, "", asks for coherence alone."""
        connected = cls.connect(given)

        def make(trait: str) -> Judge:
            return connected(
                trait=trait,
                # a judge of coherence alone asks that question twice, which counts as once
                trait_prompt=given.trait_prompts.get(trait, TRAIT_PROMPT) if trait else given.coherence_prompt,
                coherence_prompt=given.coherence_prompt,
                cache=AnswerCache(given.cache),
            )

        return make

    @classmethod
    @abstractmethod
    def connect(cls, given: JudgeSettings) -> Callable[..., Judge]:
        """Returns what makes a judge of one model, given `trait`, `trait_prompt`, `coherence_prompt` and `cache`.

        Raises `ValueError` if that model can't judge.
        """

    @classmethod
    @abstractmethod
    def sampler(cls, given: JudgeSettings, max_new_tokens: int) -> Sampler:
        """Returns what asks the model for its likeliest words, where a number would not do."""

    def describe(self) -> dict[str, Any]:
        """The judge as JSON: model, prompts, and under `score` what scores were read from so far.

        `score` is `"log-probabilities"`, `"text"`, the count of each if there were both, or `None` before the first.
        """
        sources = dict(sorted(self._sources.items()))
        return {
            **self._description(),
            "trait_prompt": self.templates["trait"],
            "coherence_prompt": self.templates["coherence"],
            "score": sources if len(sources) > 1 else next(iter(sources), None),
        }

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], pairs: Sequence[PromptPair] | None = None
    ) -> list[JudgeScores]:
        """See `Judge.score`; answers go to the cache as they come: what was asked is not lost if the run stops.

        Raises:
            ServerError, TooManyFailures: as `ChatServer.stream`.
        """
        asked = [
            {
                name: fill_prompt(template, question=prompt_text(prompt), answer=completion)
                for name, template in self.templates.items()
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        texts = [text for each in asked for text in each.values()]
        key = partial(answer_key, self.identity, parameters=self.parameters)
        replies = ask_once(texts, key, self._ask, self.cache, self.usage)
        return [self._scores({name: replies[text] for name, text in each.items()}) for each in asked]

    def _scores(self, replies: dict[str, Any]) -> JudgeScores:
        for name, reply in replies.items():
            if isinstance(reply, Failure):
                return JudgeScores(None, None, f"{name}: {reply.reason}")
        scored = {name: self._read(reply) for name, reply in replies.items()}
        self._sources.update(each.source for each in scored.values())
        return JudgeScores(scored["trait"].score, scored["coherence"].score)

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """What `describe` says of the model."""

    @abstractmethod
    def _ask(self, texts: list[str]) -> Generator[dict[str, dict[str, Any] | Failure]]:
        """Put each text to the model as a user's turn; yields replies (JSON) by text, some at a time."""

    @abstractmethod
    def _read(self, reply: dict[str, Any]) -> Scored:
        """The score in a reply."""
