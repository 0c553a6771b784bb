"""Triplets drawn from a model here and scored by a judge, in one call and in memory."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.prompts.messages import Message
from peft_psr.training.data.draws import drawn_triplet
from peft_psr.training.data.placement import add_instruction
from peft_psr.training.data.triplets import Triplet
from peft_psr.training.judges.base import Judging, judge_answers
from peft_psr.training.sampling.local import sample_completions


def generate_triplets(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    prompts: Sequence[Sequence[Message]],
    judge: Judging,
    num_draws: int = 10,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> list[Triplet]:
    """Sample and judge completions for every instruction x prompt x draw; nothing is filtered.

    The judge sees the bare prompt, as METHOD asks, so that prompted and steered models are judged alike.

    Args:
        model: Any causal language model; its adapters, if it has any, stay on.
        processing_class: Its tokenizer.
        instructions: System texts that elicit the trait.
        prompts: Conversations without the instruction.
        judge: Scores the completions: a `Judge`, or a plain function of prompts and completions.
        num_draws: Completions for each pair of instruction and prompt.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the sampling.
        batch_size: Completions sampled together.
        seed: Same seed, same machine: same triplets, in any batch size.
        progress: Show a progress bar.

    Raises:
        ValueError: no instructions, no prompts, or `num_draws` below 1.
    """
    for name, value in {"instructions": instructions, "prompts": prompts}.items():
        if len(value) == 0:
            raise ValueError(f"generate_triplets needs at least one of its `{name}`, got none.")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    pairs = [(list(p), add_instruction(p, i)) for i in instructions for p in prompts for _ in range(num_draws)]
    completions = sample_completions(
        model,
        processing_class,
        [steered for _, steered in pairs],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        progress="sampling triplets" if progress else None,
    )
    scores = judge_answers(judge, [prompt for prompt, _ in pairs], [completion.answer for completion in completions])
    triplets = [drawn_triplet(*pair, drawn) for pair, drawn in zip(pairs, completions, strict=True)]
    for triplet, score in zip(triplets, scores, strict=True):
        triplet["trait_score"], triplet["coherence_score"] = score.trait, score.coherence
    return triplets
