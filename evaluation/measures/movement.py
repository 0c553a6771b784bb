"""What moves at each token: under the trait's instruction, under a neutral one, and under the adapter.

With A_l the stream of the plain run on x y', all differences on the same tokens of layer l:

    Delta_PS = A_l(x' y') - A_l      the trait's instruction
    Delta_N  = A_l(x_n y') - A_l     a neutral instruction x_n, which does not ask for the trait
    Delta_R  = A_l(x'' y') - A_l     the trait's instruction in other words
    Delta_AS = A_l(x y', edited) - A_l

    relative RMSE of Delta    sqrt(sum |Delta - Delta_PS|^2 / sum |Delta_PS|^2)
    neutral size              sqrt(sum |Delta_N|^2 / sum |Delta_PS|^2)
    neutral cosine            sum <Delta_N, Delta_PS> / sqrt(sum |Delta_N|^2 sum |Delta_PS|^2)
    token correlation         Spearman's over the tokens of one response, of |Delta_AS| with |Delta_PS| (r_p), with
                              |Delta_N| (r_n), and with the first given the second,
                              (r_p - r_n r_pn) / sqrt((1 - r_n^2) (1 - r_pn^2)); means over layers
    strength                  |Delta| / |A_l|

The first tokens of a response move under any instruction, so that an edit which is large where Delta_PS is large need
not have found the trait: what counts is the correlation given Delta_N.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_psr.prompts.conversations import Prompt
from peft_psr.training import Triplet
from peft_psr.training.data.collator import Batch

from .faithfulness import measured_layers, response_log_probs, triplet_batches
from .strength import run_adapter_branch


STEERED, REWORDED, NEUTRAL = "steered", "reworded", "neutral"
"""What is compared with the prompted run."""

POSITION_GROUPS = {"last prompt token": (0, 1), "token 1": (1, 2), "tokens 2-4": (2, 5), "tokens 5-16": (5, 17)}
"""{name: first and end of the places of tokens, the response's first being 1}; what comes later is "later tokens"."""
LATER = "later tokens"
CONSTANT = 2e-2
"""Sizes that differ by less than this share of the largest are equal but for rounding, in bfloat16 too."""


@dataclass(frozen=True)
class Movement:
    """What moved at the edited tokens of one triplet.

    Attributes:
        tokens: Their ids, (tokens,).
        places: (tokens,) int64: 0 for the last prompt token, 1 for the response's first, negative in the question.
        base: (layers, tokens, d) float32, the plain run's stream.
        prompt: (layers, tokens, d), Delta_PS.
        others: {name: (layers, tokens, d)}: Delta_AS as "steered", Delta_N as "neutral", Delta_R as "reworded".
        kl: {name: KL(prompted || name), summed over the response's tokens, in nats}; that of the plain run as "base".
    """

    tokens: torch.Tensor
    places: torch.Tensor
    base: torch.Tensor
    prompt: torch.Tensor
    others: Mapping[str, torch.Tensor]
    kl: Mapping[str, float]


@torch.no_grad()
def movements(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    neutral_prompts: Sequence[Prompt],
    reworded_prompts: Sequence[Prompt] | None = None,
    alpha: float = 1.0,
    batch_size: int = 8,
) -> Iterator[Movement]:
    """Yields what moved on each triplet, in order; arguments that are not told of here are those of `prompt_recovery`.

    `neutral_prompts` are each triplet's prompt with the neutral instruction, `reworded_prompts` with the trait's in
    other words, if there is one. `ValueError` if there are no triplets, one that can't be used, or not one prompt for
    each.
    """
    names = measured_layers(model)
    versions = {"prompt": list(triplets), NEUTRAL: _with_prompts(triplets, neutral_prompts)}
    if reworded_prompts is not None:
        versions[REWORDED] = _with_prompts(triplets, reworded_prompts)
    batches = [triplet_batches(model, rows, processing_class, batch_size, alpha) for rows in versions.values()]
    for of_each in zip(*batches, strict=True):
        batch = of_each[0]
        runs = {"base": _run(model, batch, names, "base"), STEERED: _run(model, batch, names, "student")}
        for name, version in zip(versions, of_each, strict=True):
            runs[name] = _run(model, version, names, "teacher")
        if len({hidden.shape for hidden, _ in runs.values()}) > 1:
            raise ValueError(
                "The neutral or the reworded instruction changes which tokens of the question are edited, so they "
                "can't be compared. Use positions: response."
            )
        yield from _by_triplet(batch, runs)


def _with_prompts(triplets: Sequence[Triplet], prompts: Sequence[Prompt]) -> list[Triplet]:
    return [{**triplet, "steered_prompt": prompt} for triplet, prompt in zip(triplets, prompts, strict=True)]


def _run(model: PeftModel, batch: Batch, names: Sequence[str], branch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams (layers, edited tokens of all rows, d) and log-probabilities (response tokens, vocabulary)."""
    run = run_adapter_branch(model, batch, names, branch, logits=True)
    assert run.logits is not None
    log_probs = response_log_probs(run.logits, batch, branch)
    hidden = torch.stack([run.hidden[name].float().to(log_probs.device) for name in names])
    return hidden, log_probs


def _by_triplet(batch: Batch, runs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Movement]:
    expected = runs["prompt"][1]
    kl = {
        name: F.kl_div(log_probs, expected, log_target=True, reduction="none").sum(dim=-1)
        for name, (_, log_probs) in runs.items()
        if name != "prompt"
    }
    edited = batch["steering_mask"].sum(dim=1).tolist()
    answered = (batch["labels"] != -100).sum(dim=1).tolist()
    ids = batch["input_ids"][batch["steering_mask"].bool()].split(edited)
    hidden = {name: streams.split(edited, dim=1) for name, (streams, _) in runs.items()}
    per_row = {name: values.split(answered) for name, values in kl.items()}
    for row, (count, response) in enumerate(zip(edited, answered, strict=True)):
        base = hidden["base"][row]
        yield Movement(
            tokens=ids[row].cpu(),
            places=torch.arange(count) - (count - response - 1),
            base=base.cpu(),
            prompt=(hidden["prompt"][row] - base).cpu(),
            others={
                name: (streams[row] - base).cpu() for name, streams in hidden.items() if name in kl and name != "base"
            },
            kl={name: values[row].sum().item() for name, values in per_row.items()},
        )


def squared_errors(movement: Movement) -> dict[str, torch.Tensor]:
    """{name: sum |Delta - Delta_PS|^2} and, as "prompt", sum |Delta_PS|^2; each (layers,)."""
    errors = {name: (delta - movement.prompt).square().sum(dim=(1, 2)) for name, delta in movement.others.items()}
    return {"prompt": movement.prompt.square().sum(dim=(1, 2)), **errors}


def position_groups(places: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name of the group: (tokens,) bool}; tokens of the question are in none."""
    groups = {name: (places >= first) & (places < end) for name, (first, end) in POSITION_GROUPS.items()}
    return {**groups, LATER: places >= max(end for _, end in POSITION_GROUPS.values())}


def neutral_sums(movement: Movement) -> dict[str, torch.Tensor]:
    """{group of tokens: (3, layers)}: sum |Delta_N|^2, sum |Delta_PS|^2, sum <Delta_N, Delta_PS> of its tokens."""
    neutral, prompt = movement.others[NEUTRAL], movement.prompt
    by_token = torch.stack(
        [neutral.square().sum(dim=-1), prompt.square().sum(dim=-1), (neutral * prompt).sum(dim=-1)]
    )  # (3, layers, tokens)
    return {name: by_token[:, :, chosen].sum(dim=-1) for name, chosen in position_groups(movement.places).items()}


def strengths(movement: Movement) -> dict[str, torch.Tensor]:
    """{name: |Delta| / |A_l|}, each (layers, tokens), of the prompt and the others."""
    stream = movement.base.norm(dim=-1).clamp(min=1e-12)
    return {
        name: delta.norm(dim=-1) / stream for name, delta in {"prompt": movement.prompt, **movement.others}.items()
    }


def token_correlations(movement: Movement) -> dict[str, float | None]:
    """How the sizes of movements agree over the tokens of one response, by rank; means over layers.

    Returns:
        `prompt_neutral`: |Delta_PS| with |Delta_N|; `edit_prompt`: |Delta_AS| with |Delta_PS|; `edit_neutral`:
        |Delta_AS| with |Delta_N|; `edit_prompt_given_neutral`: the partial correlation. Between -1 and 1; `None` where
        no layer has tokens enough (4) whose sizes differ.
    """
    response = movement.places >= 0  # the question's tokens are edited too, under some positions
    deltas = {"prompt": movement.prompt, **movement.others}
    sizes = {name: delta[:, response].norm(dim=-1) for name, delta in deltas.items()}
    edit, prompt, neutral = (_ranks(sizes[name]) for name in (STEERED, "prompt", NEUTRAL))
    with_prompt, with_neutral, between = _pearson(edit, prompt), _pearson(edit, neutral), _pearson(prompt, neutral)
    rest = ((1 - with_neutral**2) * (1 - between**2)).clamp(min=0).sqrt()
    partial = torch.where(rest > 1e-6, (with_prompt - with_neutral * between) / rest, torch.nan)
    found = {
        "prompt_neutral": between,
        "edit_prompt": with_prompt,
        "edit_neutral": with_neutral,
        "edit_prompt_given_neutral": partial,
    }
    return {
        name: None if values.isnan().all() or int(response.sum()) < 4 else values.nanmean().item()
        for name, values in found.items()
    }


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks within each row of (layers, tokens), from 0; equal values share their mean rank, a constant row is NaN."""
    tokens = values.shape[-1]
    # sorted by value, the mean of first and last place of each value's equals
    ordered = values.sort(dim=-1).values.contiguous()
    first = torch.searchsorted(ordered, values.contiguous(), right=False)
    last = torch.searchsorted(ordered, values.contiguous(), right=True)
    ranks = (first + last - 1).double() / 2
    constant = values.amax(dim=-1) - values.amin(dim=-1) <= CONSTANT * values.amax(dim=-1)
    return torch.where(constant[:, None].expand(-1, tokens), torch.nan, ranks)


def _pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each row; (layers,)."""
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    return (a * b).sum(dim=-1) / (a.square().sum(dim=-1) * b.square().sum(dim=-1)).sqrt()
