"""How near the steered model comes to the prompted one, measured on the same tokens without any judge.

    prompt recovery   1 - KL(prompted || steered) / KL(prompted || base), KL summed over response tokens
    relative RMSE     RMS(A_{l|AS} - A_{l|PS}) / RMS(A_{l|PS} - A_l), for each layer l

Recovery: 1 = the prompt replaced, 0 = nothing done, negative = worse than nothing. RMSE: 0 = the prompt itself, 1 = no
steering; METHOD 6. Both on triplets held out from the adapter's training.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from peft_psr.base_model.decoder import decoder_layer_names, layer_index
from peft_psr.prompts.conversations import Prompt
from peft_psr.training import TripletCollator
from peft_psr.training.data.collator import Batch, to_device
from peft_psr.training.data.dataset import encode_dataset
from peft_psr.training.data.triplets import Triplet
from peft_psr.training.passes.branches import Branch

from .adapters.registry import kind_of
from .strength import at_strength, run_adapter_branch


def triplet_batches(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    alpha: float,
) -> Iterator[Batch]:
    """Batches of triplets at one strength, on the model's device.

    `TypeError` without a PSR or LoRA adapter, `ValueError` without triplets, or if one can't be used.
    """
    collator = TripletCollator(processing_class, kind_of(model).positions(model), alpha)
    rows = encode_dataset(collator, triplets, "triplets")
    device = next(model.parameters()).device
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):  # type: ignore[arg-type]
        yield to_device(batch, device)


def measured_layers(model: PeftModel) -> list[str]:
    """Names of the decoder layers, in order; `TypeError` without a PSR or LoRA adapter."""
    kind_of(model)
    pattern = getattr(model.active_peft_config, "layers_pattern", None)
    return decoder_layer_names(model.get_base_model(), pattern)


def log_probs_at(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Log-probabilities at places, (batch, seq) 0/1, of (batch, seq, vocabulary): (places, vocabulary) float32."""
    return F.log_softmax(logits[places.bool()].float(), dim=-1)


def response_log_probs(logits: torch.Tensor, batch: Batch, branch: str) -> torch.Tensor:
    """Log-probabilities at the places that predict the response, which ends each right-padded row.

    `logits` are (batch, seq, vocabulary), of `branch`: "teacher", "base" or "student". Returns (response tokens of all
    rows, vocabulary) float32.
    """
    attention_mask = batch["teacher_attention_mask" if branch == "teacher" else "attention_mask"]
    lengths = (batch["labels"] != -100).sum(dim=1, keepdim=True)
    positions = torch.arange(logits.shape[1], device=logits.device)
    ends = attention_mask.sum(dim=1, keepdim=True) - 1
    return log_probs_at(logits, (positions < ends) & (positions >= ends - lengths))


@torch.no_grad()
def log_probs_by_branch(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float,
    batch_size: int,
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, list[int]]]:
    """Yields for each batch {branch: (response tokens, vocabulary)}, the response tokens, and how many each row has.

    The branches are "teacher", "base" and "student"; logits of one branch at a time are in memory. Raises as
    `triplet_batches`.
    """
    for batch in triplet_batches(model, triplets, processing_class, batch_size, alpha):
        log_probs = {}
        for branch in ("teacher", "base", "student"):
            logits = run_adapter_branch(model, batch, [], branch, logits=True).logits
            assert logits is not None
            log_probs[branch] = response_log_probs(logits, batch, branch)
        responses = batch["labels"] != -100
        yield log_probs, batch["labels"][responses], responses.sum(dim=1).tolist()


@torch.no_grad()
def prompt_recovery(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float = 1.0,
    batch_size: int = 8,
) -> float:
    """Share of the prompt's effect on the next-token distribution that the adapter brings about.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter, in eval mode.
        triplets: Held-out triplets; their scores do not matter.
        processing_class: The tokenizer.
        alpha: Strength.
        batch_size: Triplets a forward pass.

    Returns:
        At most 1; 0 for an adapter that does nothing.

    Raises:
        ValueError: no triplets, or the prompt does not change the model's predictions on any of them.
    """
    steered = base = 0.0
    for log_probs, _, _ in log_probs_by_branch(model, triplets, processing_class, alpha, batch_size):
        steered += _divergence(log_probs, "student")
        base += _divergence(log_probs, "base")
    return _recovery(steered, base)


def _divergence(log_probs: Mapping[str, torch.Tensor], branch: str) -> float:
    """KL(prompted || branch), summed over tokens, in nats."""
    return F.kl_div(log_probs[branch], log_probs["teacher"], log_target=True, reduction="sum").item()


def _recovery(steered: float, base: float) -> float:
    if base <= 0:
        raise ValueError("The prompt does not change the model's predictions on any triplet: nothing to recover.")
    return 1.0 - steered / base


@torch.no_grad()
def recovery_and_rmse(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float = 1.0,
    batch_size: int = 8,
) -> tuple[float, dict[int | str, float]]:
    """`prompt_recovery` and `relative_rmse` of an adapter, with their arguments, from the same forward passes."""
    names = measured_layers(model)
    error, effect = Counter[str](), Counter[str]()
    steered = base = 0.0
    for batch in triplet_batches(model, triplets, processing_class, batch_size, alpha):
        branches = {b: run_adapter_branch(model, batch, names, b, logits=True) for b in ("teacher", "base", "student")}
        log_probs = {}
        for name, branch in branches.items():
            assert branch.logits is not None
            log_probs[name] = response_log_probs(branch.logits, batch, name)
        steered += _divergence(log_probs, "student")
        base += _divergence(log_probs, "base")
        effect.update(_squares(branches["teacher"], branches["base"]))
        error.update(_squares(branches["teacher"], branches["student"]))
    return _recovery(steered, base), _by_layer(error, effect)


@torch.no_grad()
def relative_rmse(
    model: PeftModel,
    triplets: Sequence[Triplet],
    processing_class: PreTrainedTokenizerBase,
    alpha: float = 1.0,
    reworded_prompts: Sequence[Prompt] | None = None,
    batch_size: int = 32,
) -> dict[int | str, float]:
    """How far the steered stream is from the prompted one at each decoder layer, in units of the prompt's own effect.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter, in eval mode.
        triplets: Held-out triplets.
        processing_class: The tokenizer.
        alpha: Strength.
        reworded_prompts: Measure the model under these prompts, one a triplet, in place of the adapter: the yardstick,
            how far two wordings of one instruction are apart.
        batch_size: Triplets a forward pass.

    Returns:
        {layer: RMSE >= 0}, over the tokens that a PSR adapter edits; for a LoRA, over the response.

    Raises:
        ValueError: no triplets, or not one reworded prompt for each.
    """
    names = measured_layers(model)
    error, effect = Counter[str](), Counter[str]()
    for batch in triplet_batches(model, triplets, processing_class, batch_size, alpha):
        teacher = run_adapter_branch(model, batch, names, "teacher")
        effect.update(_squares(teacher, run_adapter_branch(model, batch, names, "base")))
        if reworded_prompts is None:
            error.update(_squares(teacher, run_adapter_branch(model, batch, names, "student")))
    if reworded_prompts is not None:
        pairs = zip(triplets, reworded_prompts, strict=True)
        reworded: list[Triplet] = [{**triplet, "prompt": prompt} for triplet, prompt in pairs]
        for batch in triplet_batches(model, reworded, processing_class, batch_size, alpha):
            teacher, other = (run_adapter_branch(model, batch, names, branch) for branch in ("teacher", "base"))
            error.update(_squares(teacher, other))
    return _by_layer(error, effect)


def _squares(one: Branch, other: Branch) -> dict[str, float]:
    """{layer name: sum of the squared differences of two streams}."""
    return {name: (h.float() - other.hidden[name].float()).square().sum().item() for name, h in one.hidden.items()}


def _by_layer(error: Mapping[str, float], effect: Mapping[str, float]) -> dict[int | str, float]:
    return {layer_index(name): (error[name] / effect[name]) ** 0.5 for name in effect if effect[name] > 0}


@torch.no_grad()
def intervention_strength(
    model: PeftModel, triplet: Triplet, processing_class: PreTrainedTokenizerBase, alpha: float = 1.0
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """How strongly the prompt, and the adapter, move each token's residual stream.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter, in eval mode.
        triplet: One triplet.
        processing_class: The tokenizer.
        alpha: Strength.

    Returns:
        The edited tokens as text, and for the prompt and for the adapter |difference to the plain run| / |plain run|,
        each (layers, tokens) float32.
    """
    names = measured_layers(model)
    (batch,) = triplet_batches(model, [triplet], processing_class, 1, alpha)
    base = run_adapter_branch(model, batch, names, "base").hidden
    moved = []
    for branch in ("teacher", "student"):
        hidden = run_adapter_branch(model, batch, names, branch).hidden
        norms = [(hidden[n].float() - base[n].float()).norm(dim=-1) / base[n].float().norm(dim=-1) for n in names]
        moved.append(torch.stack(norms).cpu())
    ids = batch["input_ids"][batch["steering_mask"].bool()].tolist()
    return [str(processing_class.decode([token])) for token in ids], moved[0], moved[1]


@torch.no_grad()
def edited_gates(
    model: PeftModel, triplet: Triplet, processing_class: PreTrainedTokenizerBase, alpha: float = 1.0
) -> dict[int | str, torch.Tensor]:
    """An adapter's gate values at the edited tokens of a triplet, summed over ranks; arguments as `prompt_recovery`.

    Returns:
        {layer: (tokens,) float32, 0 or more}, in model order; empty for a kind of adapter without gates.
    """
    (batch,) = triplet_batches(model, [triplet], processing_class, 1, alpha)
    with at_strength(model, alpha):
        return kind_of(model).gates(model, batch)
