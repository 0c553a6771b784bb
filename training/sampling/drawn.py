"""A triplet from a completion that was drawn."""

from peft_psr.prompts.conversations import Prompt
from peft_psr.training.data.draws import Completion
from peft_psr.training.data.triplets import Triplet


def drawn_triplet(prompt: Prompt, steered_prompt: Prompt, drawn: Completion) -> Triplet:
    """A triplet of what was drawn, without scores.

    Args:
        prompt: x.
        steered_prompt: x'.
        drawn: y', with its tokens as far as they are known.
    """
    triplet = Triplet(prompt=prompt, steered_prompt=steered_prompt, completion=drawn.text, truncated=drawn.truncated)
    if drawn.ids is not None:
        triplet["completion_ids"] = list(drawn.ids)
    if drawn.opened:
        triplet["reasoning_opened"] = True
    return triplet
