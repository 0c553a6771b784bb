"""What passes between the parts of a triplet run: prompt pairs, the draws made on them, and what came of each draw.

A source of traits yields `PromptPair`s; a run numbers several `Draw`s on each; a `Sampler` turns them into
`Completion`s or `Failure`s. Nothing here loads a model or opens a connection.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peft_psr.files import sha256
from peft_psr.prompts.conversations import Prompt
from peft_psr.prompts.reasoning import split_reasoning

from .triplets import Triplet


@dataclass(frozen=True)
class PromptPair:
    """The two prompts of a contrast: completions are drawn on the steered one and trained on with both.

    Attributes:
        id: Unique and stable in a run, e.g. `"sycophantic/2/17"` (trait/instruction/question).
        trait: Trait, concept, or IFEval instruction id.
        prompt: x, the prompt without the steering text.
        steered_prompt: x', the prompt with it.
        negative: Whether x' asks for the opposite of the trait; kept apart from the training triplets.
        metadata: What a judge or a report needs, as JSON: the question, IFEval's `instruction_id_list` and `kwargs`.
    """

    id: str
    trait: str
    prompt: Prompt
    steered_prompt: Prompt
    negative: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """One request for a completion.

    Attributes:
        id: `f"{pair.id}/{number}"`.
        prompt: What the model is given: the pair's x'.
        seed: 0 ≤ seed < 2^31, from the run's seed and `id` alone (`draw_seed`).
    """

    id: str
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Completion:
    """A completion, most often one that was drawn.

    Attributes:
        text: Without the token that ends the turn; other special tokens are part of it.
        truncated: Whether it stopped at the token limit and not at an end.
        prompt_tokens: Tokens of the prompt; None where the engine does not say.
        completion_tokens: Tokens drawn; None where the engine does not say.
        ids: The tokens drawn, with the one that ends the turn; None where the engine does not say, or nobody drew.
        opened: The prompt ended inside reasoning, which the text goes on with.
        reasoned: The engine has kept reasoning back, so that the text is not all that was drawn.
    """

    text: str
    truncated: bool
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ids: tuple[int, ...] | None = None
    opened: bool = False
    reasoned: bool = False

    @property
    def answer(self) -> str | None:
        """What there is to judge: the text without finished reasoning, None where the reasoning was cut off."""
        return split_reasoning(self.text, self.opened).answer


@dataclass(frozen=True)
class Failure:
    """A draw that could not be made, after every retry.

    Attributes:
        reason: Short, and free of secrets.
    """

    reason: str


class Sampler(Protocol):
    """Makes draws, in any order; the same draw gives the same text as far as the engine can promise it."""

    def describe(self) -> dict[str, Any]:
        """Returns engine, model, revision, chat template hash and settings, as JSON, and what cannot be reproduced."""
        ...

    def __call__(self, draws: Sequence[Draw]) -> Iterator[tuple[Draw, Completion | Failure]]:
        """Yields each draw with its outcome as it finishes; closing the iterator stops the work."""
        ...


def check_sampling(max_new_tokens: int, temperature: float, batch_size: int = 1) -> None:
    """Raises `ValueError` for a setting that no sampler can work with."""
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}.")


def draw_seed(run_seed: int, draw_id: str) -> int:
    """Returns the draw's seed, 31 bits of SHA-256 of both: the same in any order, batch or restart."""
    return int(sha256(f"{run_seed}/{draw_id}")[:8], 16) >> 1


def draws_on(pair: PromptPair, count: int, run_seed: int) -> list[Draw]:
    """Returns `count` draws on the pair's steered prompt, numbered from 0."""
    ids = (f"{pair.id}/{number}" for number in range(count))
    return [Draw(id=identity, prompt=pair.steered_prompt, seed=draw_seed(run_seed, identity)) for identity in ids]


def template_hash(template: Any) -> str | None:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a tokenizer's chat template; None where it has none.

    Named templates are a mapping, as tokenizers hold them.
    """
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return sha256(text)[:16]


def drawn_triplet(prompt: Prompt, steered_prompt: Prompt, drawn: Completion) -> Triplet:
    """A triplet, without scores, of x, x' and what was drawn, with its tokens as far as they are known."""
    triplet = Triplet(prompt=prompt, steered_prompt=steered_prompt, completion=drawn.text, truncated=drawn.truncated)
    if drawn.ids is not None:
        triplet["completion_ids"] = list(drawn.ids)
    if drawn.opened:
        triplet["reasoning_opened"] = True
    return triplet
