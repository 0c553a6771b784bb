"""Difference in means: z = mean over response tokens of A_{l|PS} - A_l, added to every edited token; no training.

Sources: contrastive activation addition (Rimsky et al., arXiv 2312.06681), with the prompted and the plain run as the
contrast and the same response in both; arXiv 2605.03907 calls it DiM.
"""

from collections.abc import Sequence

from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr import PSRConfig
from peft_psr.training import Triplet, initialize_psr_weights

from .method import FitSettings, Fitted


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> Fitted:
    """Makes the adapter; see `Method`."""
    config = PSRConfig(gate="constant", layers_to_transform=settings.layer, positions=settings.positions)
    steered = get_peft_model(model, config)
    initialize_psr_weights(steered, triplets, "mean_difference", processing_class=processing_class, progress=False)
    return Fitted(steered.eval())
