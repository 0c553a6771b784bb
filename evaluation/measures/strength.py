"""The strength alpha of an adapter, and what a model computes and answers at it, whatever the adapter's kind.

1 is the adapter as it was trained, 0 the base model; `adapters.kind` has the formulas.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.config import check_strength
from peft_psr.prompts.conversations import Prompt
from peft_psr.training import sample_completions
from peft_psr.training.data.collator import Batch
from peft_psr.training.data.draws import Completion
from peft_psr.training.passes.branches import Branch, run_branch

from .adapters.registry import kind_of


def at_strength(model: PeftModel, alpha: float) -> AbstractContextManager[None]:
    """Sets the strength of the active adapters inside the context; it replaces theirs, nested or not.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter.
        alpha: A finite number; negative ones steer away.

    Raises:
        TypeError: the model has neither adapter, or alpha is not a number.
        ValueError: alpha is not finite; or a LoRA does more than to add to weights, or has been merged into them.
    """
    return kind_of(model).at_strength(model, check_strength(alpha, "alpha"))


def run_adapter_branch(
    model: PeftModel, batch: Batch, layers: Sequence[str], branch: str, logits: bool = False
) -> Branch:
    """`peft_psr.training.passes.branches.run_branch` without gradient, for a model with an adapter of any kind.

    `branch`: "teacher" (x' y', adapter off), "base" (x y', adapter off) or "student" (x y', adapter on). `TypeError`
    without a PSR or LoRA adapter, `ValueError` for several strengths in a batch for a LoRA.
    """
    with torch.no_grad():
        if branch == "student":
            return kind_of(model).steered_branch(model, batch, layers, logits)
        return run_branch(model, batch, layers, branch, logits)


def sample_steered(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    alpha: Sequence[float] | None,
    **settings: Any,
) -> list[Completion]:
    """`sample_completions` for a model with an adapter of any kind: a LoRA's strengths are sampled one by one.

    `alpha` is one strength a prompt; `None` for the adapter as it is, or a model without one. With a LoRA a completion
    depends on the seed and on the prompt's place among those of its strength. Raises as these two functions.
    """
    if alpha is None:
        return sample_completions(model, processing_class, prompts, **settings)
    return kind_of(model).sample(cast(PeftModel, model), processing_class, prompts, alpha, **settings)
