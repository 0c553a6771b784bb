"""What a steering method is to the benchmarks: a way to make an adapter of a base model from triplets.

Every edit of activations that is affine, or affine behind a ReLU, is a PSR adapter of some rank, so most methods end
as one: it is saved, mixed and turned up and down like any other. What differs is how its weights are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_psr.registry import loaded


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_psr.training import Triplet


PLAIN, PROMPT = "none", "prompt"
"""What tables call the model without steering, and with the instruction in its prompt."""


@dataclass(frozen=True)
class FitSettings:
    """What every method is given besides the triplets.

    Attributes:
        layer: The layer that single-layer methods edit, from 0.
        positions: Which tokens are edited; see `PSRConfig`.
        seed: Of random starts and of the order of the triplets.
        epochs: Passes over the triplets: to imitate the prompted model (MSE, KL), and for likelihood and preference.
        batch_size: Triplets a training step.
        learning_rate: In place of the method's own, if given.
        alpha: Strength while training: a number, or "trait_score" for each triplet's trait score / 100.
        on_step: Called with the training steps done and those in all.
    """

    layer: int
    positions: str = "response"
    seed: int = 0
    epochs: tuple[float, float] = (15.0, 7.0)
    batch_size: int = 8
    learning_rate: float | None = None
    alpha: float | str = "trait_score"
    on_step: Callable[[int, int], None] | None = None


@dataclass
class Fitted:
    """What a method has made.

    Attributes:
        model: In eval mode, with the adapter "default" active; its strength is what `at_strength` sets.
        dead_gates: Names of layers whose gates never open.
        notes: What the method found on its way and a reader of the results may want to know, as JSON.
        seconds: It took to make, where that was measured.
        bytes: Of the adapter's file, where it was saved.
    """

    model: PeftModel
    dead_gates: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Method:
    """One row of the benchmarks' tables.

    Attributes:
        name: As in the paper's tables: S- or A- for a single layer or all, the edit, the objective, the start.
        maker: What makes the adapter, or "module:function" where it is, so that listing methods loads nothing. It is
            called with base model, tokenizer, triplets and `FitSettings`, returns `Fitted`, and leaves the base
            model's own weights as they are.
        objective: What is minimised, or "none" for what is computed in one pass.
        start: Where training starts from.
        source: Where the method comes from.
        options: More keyword arguments of the maker.
        every_token: Whether it changes every token's computation, whatever `FitSettings.positions` says.
    """

    name: str
    maker: Callable[..., Fitted] | str
    objective: str
    start: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    every_token: bool = False

    def fit(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        triplets: Sequence[Triplet],
        settings: FitSettings,
    ) -> Fitted:
        """Makes an adapter of a base model.

        Raises:
            ValueError: the method can't use the triplets, or the model has no such layer.
        """
        return loaded(self.maker)(model, processing_class, triplets, settings, **self.options)
