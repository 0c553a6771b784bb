"""LoRA, as PEFT has it: W <- W + B A on every linear layer of attention and MLP, trained by likelihood.

Source: arXiv 2106.09685. It changes every token's computation, the prompt's too, whatever tokens activation methods
edit; and it is trained at strength 1 on all triplets, since one forward pass has one set of weights.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.methods.fitting.likelihood import train_by_likelihood
from peft_psr.training import Triplet

from .method import FitSettings, Fitted


LEARNING_RATE = 1e-3
"""Of 1e-3, 2e-3 and 5e-3 on two traits of the embedded model, one seed: prompt recovery within 0.005 of the best."""


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
    r: int,
) -> Fitted:
    """Makes a LoRA of rank `r`; see `Method`."""
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    adapted = get_peft_model(model, config)
    learning_rate = settings.learning_rate or LEARNING_RATE
    train_by_likelihood(adapted, processing_class, triplets, settings, learning_rate)
    return Fitted(adapted.eval(), notes={"learning_rate": learning_rate, "alpha_while_training": 1.0})
