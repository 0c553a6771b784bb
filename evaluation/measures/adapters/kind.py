"""What the measures ask of a kind of adapter: to be set to a strength, and to run and answer at it.

    PSR     A <- A + alpha * edit(A)
    LoRA    W <- W + alpha * (lora_alpha / r) * B A     on every token, the prompt's included; arXiv 2106.09685

1 is the adapter as it was trained, 0 the base model.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_psr.base_model.decoder import capture_layer_outputs
from peft_psr.prompts.conversations import Prompt
from peft_psr.training import sample_completions
from peft_psr.training.data.collator import Batch, branch_inputs
from peft_psr.training.data.draws import Completion
from peft_psr.training.passes.branches import Branch, few_logits
from peft_psr.training.passes.partial import in_eval_mode


class AdapterKind(ABC):
    """A kind of adapter; what is given here suits any that acts on all tokens with one strength a forward pass.

    `mixed`: whether rows of a batch may have adapters and strengths of their own.
    """

    mixed = False

    @abstractmethod
    def at_strength(self, model: PeftModel, alpha: float) -> AbstractContextManager[None]:
        """Sets the strength of the active adapters inside the context to a finite number, or raises `ValueError`."""

    def positions(self, model: PeftModel) -> str:
        """The tokens on which hidden states are compared, as `PSRConfig.positions` names them."""
        return "response"

    def gates(self, model: PeftModel, batch: Batch) -> dict[int | str, torch.Tensor]:
        """{layer: gate values at the edited tokens of a batch's only row, (tokens,)}; empty for a kind without."""
        return {}

    def scoring_inputs(self, model: PeftModel, answer: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a forward pass that scores given answers takes besides the tokens.

        `answer` and `tokens`, (batch, seq) bool: the places that predict the answers, and all places but padding.
        """
        return {}

    def steered_branch(self, model: PeftModel, batch: Batch, layers: Sequence[str], logits: bool) -> Branch:
        """The adapter's run on x y', see `run_adapter_branch`; `ValueError` if the rows have several strengths."""
        strengths = set(batch["alpha"].tolist())
        if len(strengths) > 1:
            kind = type(model.base_model).__name__
            raise ValueError(f"A {kind} has one strength for the whole batch, got {sorted(strengths)}.")
        inputs: dict[str, Any] = branch_inputs(batch, "student")
        if not logits:
            inputs |= few_logits(model)
        captured = capture_layer_outputs(model.get_base_model(), layers)
        with in_eval_mode(model), self.at_strength(model, *strengths), captured as outputs:
            result = model(**inputs, use_cache=False)
        mask = batch["steering_mask"].bool()
        hidden = {name: outputs[name][mask.to(outputs[name].device)] for name in layers}
        return Branch(hidden, gates={}, logits=result.logits if logits else None)

    def sample(
        self,
        model: PeftModel,
        processing_class: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        alpha: Sequence[float],
        **settings: Any,
    ) -> list[Completion]:
        """Answers at one strength a prompt, strength after strength; see `sample_steered`."""
        places: dict[float, list[int]] = {}
        for place, (_, strength) in enumerate(zip(prompts, alpha, strict=True)):
            places.setdefault(strength, []).append(place)
        completions: dict[int, Completion] = {}
        for strength, of_strength in places.items():
            with self.at_strength(model, strength):
                drawn = sample_completions(model, processing_class, [prompts[i] for i in of_strength], **settings)
            completions |= zip(of_strength, drawn, strict=True)
        return [completions[place] for place in range(len(prompts))]
