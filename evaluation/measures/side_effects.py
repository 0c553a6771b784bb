"""What steering changes besides the trait, with the prompt itself as the yardstick.

    neutral KL      KL(base || steered), in nats per token of the base model's own answers to neutral prompts
    perplexity      exp(mean cross-entropy) of given texts: base, steered and prompted
    usable range    the strengths from 0 on at which mean coherence stays above a floor

A prompt is neutral if the trait should not show in its answer although the instruction, or the adapter, is there: the
user asks to drop it, say, or the text is no answer. Of an ordinary question the trait is what was asked for. The first
two are computed on given tokens, without a judge; KL from the base model, whose answer is right, to the steered one.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.prompts.conversations import Prompt
from peft_psr.training import Triplet, add_instruction, sample_completions
from peft_psr.training.data.draws import drawn_triplet
from peft_psr.training.data.placement import Placement
from peft_psr.training.passes.branches import unedited

from .calibration import calibrate_alpha
from .faithfulness import log_probs_by_branch, prompt_recovery
from .scoring import SteeringScore


@dataclass(frozen=True)
class NeutralKL:
    """How far neutral answers are from the base model's.

    Attributes:
        steered: KL(base || steered), nats per response token, >= 0.
        prompted: KL(base || prompted), the yardstick; 0 where the prompts carry no instruction.
        tokens: How many response tokens the means are over.
        responses: How many responses; `steered * tokens / responses` is in nats per response.
    """

    steered: float
    prompted: float
    tokens: int
    responses: int


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of given texts under three models, >= 1.

    Attributes:
        base: The model without adapter and instruction.
        steered: The model with the adapter.
        prompted: The model with the instruction; equal to `base` where the prompts carry none.
        tokens: How many tokens the means are over.
    """

    base: float
    steered: float
    prompted: float
    tokens: int


@dataclass(frozen=True)
class UsableRange:
    """Strengths that can be used: from 0 up to `upper`.

    Attributes:
        upper: The largest strength up to which mean coherence stays above the floor; 0 if none was found.
        why: What stands in the way of an exact answer; `None` if nothing does.
        curve: All that was seen, by growing alpha.
    """

    upper: float
    why: str | None
    curve: list[SteeringScore]


@dataclass(frozen=True)
class SideEffects:
    """What an adapter does at one strength, next to what the prompt does.

    Attributes:
        alpha: The strength of everything here but `usable`.
        steered: Trait and coherence, 0-100, on prompts where the trait is asked for.
        prompted: The same of the prompted model.
        neutral_steered: Trait and coherence on neutral prompts: the trait where it should not be.
        neutral_prompted: The same of the prompted model.
        neutral_kl: {name of the neutral prompts or texts: `NeutralKL`}.
        perplexity: {name of the texts: `TextPerplexity`}.
        prompt_recovery: At most 1; see `peft_psr.evaluation.prompt_recovery`.
        usable: The usable range of strengths.
    """

    alpha: float
    steered: SteeringScore
    prompted: SteeringScore
    neutral_steered: SteeringScore
    neutral_prompted: SteeringScore
    neutral_kl: dict[str, NeutralKL]
    perplexity: dict[str, TextPerplexity]
    prompt_recovery: float
    usable: UsableRange

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)


def neutral_triplets(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    instructions: Sequence[str] = ("",),
    placement: Placement = "system",
    num_draws: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    progress: str | None = None,
) -> list[Triplet]:
    """The base model's own answers to neutral prompts: for every instruction x prompt x draw; empty ones are left out.

    Without instructions they are training rows on which the edit is to be nothing (`steered_prompt` equals `prompt`).
    With instructions they are what `neutral_kl` measures adapter and prompt on.

    Args:
        model: Any causal language model; the adapters of a PEFT model are off while it answers.
        processing_class: Its tokenizer.
        prompts: Conversations or plain texts on which the trait should not show.
        max_new_tokens: Longest answer, in tokens.
        instructions: Texts that elicit the trait, put into `steered_prompt` alone.
        placement: Where they stand; see `peft_psr.training.data.placement`.
        num_draws: Answers for each pair.
        batch_size: Answers sampled together.
        seed: Of the sampling, at temperature 1.
        progress: Title of a progress bar, or `None`.

    Raises:
        ValueError: no prompts, no instructions, or every answer is empty.
    """
    for name, value in {"prompts": prompts, "instructions": instructions}.items():
        if not value:
            raise ValueError(f"neutral_triplets needs at least one of its `{name}`, got none.")
    pairs = [
        (prompt, add_instruction(prompt, instruction, placement))
        for instruction in instructions
        for prompt in prompts
        for _ in range(num_draws)
    ]
    with unedited(model) if isinstance(model, PeftModel) else nullcontext():
        answers = sample_completions(
            model,
            processing_class,
            [prompt for prompt, _ in pairs],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    triplets = [
        drawn_triplet(prompt, steered, answer)
        for (prompt, steered), answer in zip(pairs, answers, strict=True)
        if answer.text
    ]
    if not triplets:
        raise ValueError(f"The model answered all of {len(pairs)} neutral prompts with nothing.")
    return triplets


def text_triplets(texts: Sequence[str], instruction: str = "") -> list[Triplet]:
    """Plain texts to measure perplexity on: the first half of the words is context, the rest is to be predicted.

    Args:
        texts: Each of at least two words.
        instruction: Text that elicits the trait; stands before the context in `steered_prompt`.

    Raises:
        ValueError: a text has fewer than two words.
    """
    triplets = []
    for i, text in enumerate(texts):
        words = text.split(" ")
        if len(words) < 2:
            raise ValueError(f"texts[{i}] has fewer than two words: {text!r}. One half is context for the other.")
        middle = len(words) // 2
        context, rest = " ".join(words[:middle]), " " + " ".join(words[middle:])
        steered = add_instruction(context, instruction, "before")
        triplets.append(Triplet(prompt=context, steered_prompt=steered, completion=rest))
    return triplets


def neutral_kl(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float = 1.0,
    batch_size: int = 32,
) -> NeutralKL:
    """KL(base || steered) on answers that should not change, and KL(base || prompted) as the yardstick.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter, in eval mode.
        triplets: The base model's answers, from `neutral_triplets` with instructions; or texts that are no answers,
            from `text_triplets`.
        processing_class: The tokenizer.
        alpha: Strength.
        batch_size: Triplets a forward pass.

    Raises:
        ValueError: no triplets, or one that can't be used; the message names it.
    """
    kl, tokens = kl_by_row(model, triplets, processing_class, alpha, batch_size)
    total = sum(tokens)
    return NeutralKL(sum(kl["student"]) / total, sum(kl["teacher"]) / total, total, len(triplets))


def kl_by_row(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float = 1.0,
    batch_size: int = 32,
) -> tuple[dict[str, list[float]], list[int]]:
    """KL(base || steered), "student", and KL(base || prompted), "teacher", of each triplet; arguments as `neutral_kl`.

    Returns:
        {branch: nats, summed over a triplet's response tokens}, and how many these are.
    """

    def kl(log_probs: Mapping[str, torch.Tensor], branch: str, targets: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_probs[branch], log_probs["base"], log_target=True, reduction="none").sum(dim=-1)

    return _by_row(kl, ("student", "teacher"), model, triplets, processing_class, alpha, batch_size)


def losses_by_row(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float = 1.0,
    batch_size: int = 32,
) -> tuple[dict[str, list[float]], list[int]]:
    """Cross-entropy of each completion under the three branches, in nats, and its tokens; see `kl_by_row`."""

    def loss(log_probs: Mapping[str, torch.Tensor], branch: str, targets: torch.Tensor) -> torch.Tensor:
        return F.nll_loss(log_probs[branch], targets, reduction="none")

    return _by_row(loss, ("base", "student", "teacher"), model, triplets, processing_class, alpha, batch_size)


def _by_row(
    measure: Callable[[Mapping[str, torch.Tensor], str, torch.Tensor], torch.Tensor],
    branches: Sequence[str],
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float,
    batch_size: int,
) -> tuple[dict[str, list[float]], list[int]]:
    """Sums over each triplet's response tokens of what `measure` gives for each token, (tokens,), of each branch."""
    sums: dict[str, list[float]] = {branch: [] for branch in branches}
    lengths: list[int] = []
    for log_probs, targets, of_rows in log_probs_by_branch(model, triplets, processing_class, alpha, batch_size):
        lengths += of_rows
        for branch in branches:
            values = measure(log_probs, branch, targets)
            sums[branch] += [part.sum().item() for part in values.split(of_rows)]
    return sums, lengths


def text_perplexity(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float = 1.0,
    batch_size: int = 32,
) -> TextPerplexity:
    """Perplexity of the completions of `triplets`, whoever wrote them.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter, in eval mode.
        triplets: Texts from `text_triplets`, or given answers: base and steered model read `prompt`, the prompted one
            reads `steered_prompt`.
        processing_class: The tokenizer.
        alpha: Strength.
        batch_size: Triplets a forward pass.

    Raises:
        ValueError: no triplets, or one that can't be used; the message names it.
    """
    losses, tokens = losses_by_row(model, triplets, processing_class, alpha, batch_size)
    total = sum(tokens)
    base, steered, prompted = (exp(sum(losses[branch]) / total) for branch in ("base", "student", "teacher"))
    return TextPerplexity(base, steered, prompted, total)


def usable_alpha_range(
    score: Callable[[float], SteeringScore],
    min_coherence: float = 80.0,
    tolerance: float = 1.0,
    max_steps: int = 10,
    max_alpha: float = 32.0,
    curve: Sequence[SteeringScore] = (),
) -> UsableRange:
    """How far the strength can be turned up from 0 with mean coherence above a floor all the way.

    Found by `calibrate_alpha`; where coherence dips below the floor and recovers, the range ends at the dip.

    Args:
        score: Measures the model at a strength.
        min_coherence: The floor, 0-100.
        tolerance: How far coherence may be from the floor at the end of the range, in points.
        max_steps: Cap on calls of `score` for each search: one, and one more for each dip.
        max_alpha: Largest strength tried.
        curve: Measurements already made; they cost nothing more.

    Raises:
        ValueError: as `calibrate_alpha`.
    """
    found = calibrate_alpha(score, min_coherence, tolerance, max_steps, max_alpha, curve)
    met = [point.coherence >= min_coherence - tolerance for point in found.curve]
    if not any(met):
        return UsableRange(0.0, found.why, found.curve)
    last = len(met) - 1 - met[::-1].index(True)
    if all(met[: last + 1]):
        return UsableRange(found.curve[last].alpha or 0.0, found.why, found.curve)
    up_to_dip = found.curve[: met.index(False) + 1]
    before = usable_alpha_range(score, min_coherence, tolerance, max_steps, max_alpha, up_to_dip)
    beyond = found.curve[len(up_to_dip) :]
    return UsableRange(before.upper, before.why, [*before.curve, *beyond])


def least_alpha(curve: Sequence[SteeringScore], trait: float) -> float | None:
    """The least strength measured at which the trait score is at least `trait`, or `None` if it is at none."""
    reached = [point.alpha for point in curve if point.alpha is not None and point.trait >= trait]
    return min(reached, default=None)


def measure_side_effects(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    alpha: float,
    score: Callable[[float], SteeringScore],
    score_neutral: Callable[[float], SteeringScore],
    prompted: SteeringScore,
    neutral_prompted: SteeringScore,
    held_out: Sequence[Triplet],
    neutral: Mapping[str, Sequence[Triplet]],
    texts: Mapping[str, Sequence[Triplet]],
    curve: Sequence[SteeringScore] = (),
    batch_size: int = 32,
) -> SideEffects:
    """Everything of this module at one strength.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter, in eval mode.
        processing_class: The tokenizer.
        alpha: Strength; `least_alpha` finds the one that reaches the prompt's trait score.
        score: Measures the model at a strength on prompts where the trait is asked for.
        score_neutral: Likewise on neutral prompts.
        prompted: The prompted model's score.
        neutral_prompted: The prompted model's score on neutral prompts.
        held_out: Triplets held out from training, for the prompt recovery.
        neutral: {name: triplets} for `neutral_kl`.
        texts: {name: triplets} for `text_perplexity`.
        curve: What `score` gave before; it costs nothing more.
        batch_size: Triplets a forward pass.

    Raises:
        ValueError: no triplets, or one that can't be used.
    """
    how = (processing_class, alpha, batch_size)
    seen = {point.alpha: point for point in curve}
    if alpha not in seen:
        seen[alpha] = score(alpha)
    return SideEffects(
        alpha=alpha,
        steered=seen[alpha],
        prompted=prompted,
        neutral_steered=score_neutral(alpha),
        neutral_prompted=neutral_prompted,
        neutral_kl={name: neutral_kl(model, rows, *how) for name, rows in neutral.items()},
        perplexity={name: text_perplexity(model, rows, *how) for name, rows in texts.items()},
        prompt_recovery=prompt_recovery(model, held_out, *how),
        usable=usable_alpha_range(score, curve=list(seen.values())),
    )
