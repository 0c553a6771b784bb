"""PSR adapters: each row its own strength, each token edited or not by the mask."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_psr.model import PSRModel
from peft_psr.prompts.conversations import Prompt
from peft_psr.training import sample_completions
from peft_psr.training.data.collator import Batch
from peft_psr.training.data.draws import Completion
from peft_psr.training.passes.branches import Branch, config_of, run_branch

from .kind import AdapterKind


class PSRKind(AdapterKind):
    """PSR's own adapters."""

    mixed = True

    @contextmanager
    def at_strength(self, model: PeftModel, alpha: float) -> Iterator[None]:
        """Sets their alpha."""
        tuner = cast(PSRModel, model.base_model)
        before = {name: config_of(model, name).alpha for name in tuner.active_adapters}
        try:
            for name in before:
                tuner.set_alpha(alpha, name)
            yield
        finally:
            for name, its_own in before.items():
                tuner.set_alpha(its_own, name)

    def positions(self, model: PeftModel) -> str:
        """Those that the active adapter edits."""
        return config_of(model, model.active_adapter).positions

    def gates(self, model: PeftModel, batch: Batch) -> dict[int | str, torch.Tensor]:
        """Gate values summed over ranks, 0 or more, on the CPU."""
        edited = batch["steering_mask"][0].bool()
        gates = model.gate_values(batch["input_ids"], model.active_adapter, steering_mask=batch["steering_mask"])
        return {layer: values[0, edited.to(values.device)].sum(dim=-1).cpu() for layer, values in gates.items()}

    def scoring_inputs(self, model: PeftModel, answer: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tokens that are edited while such an answer is generated."""
        return {"steering_mask": (answer if self.positions(model) == "response" else tokens).long()}

    def steered_branch(self, model: PeftModel, batch: Batch, layers: Sequence[str], logits: bool) -> Branch:
        """In one pass, whatever the rows' strengths."""
        return run_branch(model, batch, layers, "student", logits)

    def sample(
        self,
        model: PeftModel,
        processing_class: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        alpha: Sequence[float],
        **settings: Any,
    ) -> list[Completion]:
        """All strengths together."""
        return sample_completions(model, processing_class, prompts, alpha=alpha, **settings)


PSR = PSRKind()
