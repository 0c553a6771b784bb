"""Activation addition: the difference that one pair of prompts makes, added to the residual stream; no training.

    z = A_l(x') - A_l(x)  at the last token of either prompt, of a single pair        h <- h + alpha * z

Source: ActAdd (Turner et al., arXiv 2308.10248): a steering vector from one contrast pair, in one forward pass each.

What differs from the source. There the pair is two short texts, such as "Love" and "Hate", padded to one length; their
difference is kept for every position and added to the first tokens of the prompt alone, at the input of a layer. Those
tokens are the chat template's own here, and text steered towards is not given but an instruction. So the pair is a
prompt with and without the instruction, drawn by `FitSettings.seed`; their question, being the same, cancels as far
as it can. Prompts of different lengths share their last token, so the difference is taken there, and added to the
output of the layer on the tokens that every other method edits. What is kept is what makes it ActAdd and not a
difference in means: one pair, whose accidents stay in the vector. Other seeds draw other pairs.
"""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.methods.fitting.contrast import contrast_pairs, last_token_stream
from peft_psr.evaluation.methods.fitting.edit_training import single_layer
from peft_psr.training import Triplet

from .method import FitSettings, Fitted


def fit(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    settings: FitSettings,
) -> Fitted:
    """Makes the adapter; see `Method`."""
    pairs = contrast_pairs(triplets, processing_class)
    pair = random.Random(settings.seed).choice(pairs)
    plain, prompted = last_token_stream(model, processing_class, pair, settings.layer, batch_size=2)
    steered, unit = single_layer(model, settings, gate="constant")
    with torch.no_grad():
        unit.direction.copy_(prompted - plain)
    notes = {"prompt": pair.plain, "steered_prompt": pair.prompted, "pairs_to_draw_from": len(pairs)}
    return Fitted(steered, notes=notes)
