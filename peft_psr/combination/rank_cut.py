"""Fewer ranks that do nearly the same: the rank cut of `PSRModel.add_weighted_adapter(combination_type="svd")`.

A layer's edit is E = ReLU(P) Z with P = h W^T + b (tokens, R) on sample tokens. Wanted are r gates, mixtures of the
old pre-activations, and r directions, mixtures of the old ones:

    min over A (r, R), c (r), Y (r, R)   of   sum over tokens |(ReLU(h (A W)^T + c) Y - ReLU(P)) Z|^2

For given gates G' the best Y is the least-squares solution of G' Y = ReLU(P). A and c are found by L-BFGS, starting
from the SVD of E, whose r first right singular vectors V give A = V^T Z^T: the best there is while every gate is
open. Staying in the span of the old weights leaves few numbers to fit, so a few hundred tokens will do; an SVD of the
weights alone would be blind to which gates open together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_psr.base_model.decoder import hidden_of
from peft_psr.config import PSRConfig
from peft_psr.hooks import attach_state, prompt_of
from peft_psr.layer import PSRLayer, layers_of
from peft_psr.unit import PSRUnit

from .concatenation import with_empty_ranks


@dataclass
class RankCut:
    """One layer's triples after the cut, and what that cost.

    Attributes:
        gate_weight: w, (r, d) float32.
        gate_bias: b, (r,) float32.
        direction: z, (r, d) float32.
        error: RMS of the missing part of the edit relative to the RMS of the edit, on tokens not used for the fit;
            0 is exact, 1 as bad as no edit.
    """

    gate_weight: torch.Tensor
    gate_bias: torch.Tensor
    direction: torch.Tensor
    error: float


def cut_rank(unit: PSRUnit, hidden: torch.Tensor, r: int) -> RankCut:
    """Fit `r` triples, 1 or more, to what `unit`, of rank R, does to `hidden` (tokens, d), what its gates read.

    Every second token is kept for the error. Fewer than four tokens are a `ValueError`.
    """
    if hidden.shape[0] < 4:
        raise ValueError(f"A rank cut needs at least 4 edited tokens in its samples, got {hidden.shape[0]}.")
    direction = unit.direction.detach().double().cpu()
    weight, bias = (values.detach().double().cpu() for values in unit.gate())
    used = direction.any(dim=1)
    if int(used.sum()) <= r:  # nothing to cut
        w, b, z = (with_empty_ranks(values[used], r).float() for values in (weight, bias, direction))
        return RankCut(w, b, z, error=0.0)
    linear = hidden.detach().double().cpu() @ weight.T
    overlap = direction @ direction.T
    fitted, held_out = linear[::2], linear[1::2]
    mixture, offset = _fit(fitted, bias, overlap, _singular(fitted + bias, direction, r))
    mixing = _solve(torch.relu(fitted @ mixture.T + offset), torch.relu(fitted + bias))
    missing = torch.relu(held_out @ mixture.T + offset) @ mixing - torch.relu(held_out + bias)
    total = _size(torch.relu(held_out + bias), overlap)
    return RankCut(
        gate_weight=(mixture @ weight).float(),
        gate_bias=offset.float(),
        direction=(mixing @ direction).float(),
        error=float((_size(missing, overlap) / total).sqrt()) if total > 0 else 0.0,
    )


@torch.no_grad()
def cut_adapter(
    tuner: BaseTuner, adapter_name: str, rank: int, samples: Sequence[Mapping[str, Any]]
) -> dict[int | str, float]:
    """Replace a model's adapter by one of lower rank, 1 or more, that is fitted to what it edits in `samples`.

    These are arguments of forward calls. Adapters that are active stay so.

    Returns:
        {layer: error}, as `RankCut` has it.

    Raises:
        ValueError: adapters are disabled, or the samples edit too few tokens.
    """
    all_layers = layers_of(tuner.model)
    if any(layer.disable_adapters for layer in all_layers.values()):
        raise ValueError("Adapters are disabled, and a rank is cut by a fit to what they do: enable them first.")
    config = cast(PSRConfig, tuner.peft_config[adapter_name])
    layers = {number: layer for number, layer in all_layers.items() if adapter_name in layer.psr_unit}
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers.values()}

    def keep_edited_tokens(module: nn.Module, args: tuple, output: Any) -> None:
        layer: PSRLayer = module.psr  # type: ignore[assignment]
        hidden = hidden_of(output, layer.name)
        mask = layer.mask(config.positions, hidden)
        seen[layer.name].append(hidden.flatten(0, -2) if mask is None else hidden[mask.bool()[..., 0]])

    # before the hook that edits
    edited = [tuner.model.get_submodule(layer.name) for layer in layers.values()]
    handles = [module.register_forward_hook(keep_edited_tokens, prepend=True) for module in edited]
    try:
        for sample in samples:
            rows = [adapter_name] * len(prompt_of((), dict(sample)))
            with attach_state(tuner.model).scaled(1.0), tuner._enable_peft_forward_hooks(adapter_names=rows):
                tuner.model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    cuts = {
        number: cut_rank(layer.unit(adapter_name), torch.cat(seen[layer.name]), min(rank, config.r))
        for number, layer in layers.items()
    }
    tuner.delete_adapter(adapter_name)
    tuner.peft_config[adapter_name] = replace(config, r=min(rank, config.r), gate="relu")
    tuner.inject_adapter(tuner.model, adapter_name)
    for number, layer in layers.items():
        unit, cut = layer.unit(adapter_name), cuts[number]
        assert unit.gate_weight is not None and unit.gate_bias is not None
        unit.gate_weight.copy_(cut.gate_weight)
        unit.gate_bias.copy_(cut.gate_bias)
        unit.direction.copy_(cut.direction)
    return {number: cut.error for number, cut in cuts.items()}


def _size(gates: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Sum over tokens |gates @ Z|^2, from Z Z^T."""
    return ((gates @ overlap) * gates).sum().clamp(min=0.0)


def _solve(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Least-squares Y of new @ Y = old; a hair of ridge keeps gates that never open harmless."""
    gram = new.T @ new
    ridge = 1e-10 * gram.diagonal().mean() + 1e-30
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), new.T @ old)


def _singular(pre: torch.Tensor, direction: torch.Tensor, r: int) -> torch.Tensor:
    """The mixture by which an edit with open gates falls on its r main directions, those pointing with the edit."""
    edit = torch.relu(pre) @ direction
    main = torch.linalg.svd(edit, full_matrices=False).Vh[:r]
    main = main * torch.where((edit @ main.T).sum(0) < 0, -1.0, 1.0)[:, None].to(main.dtype)
    return main @ direction.T


def _fit(
    linear: torch.Tensor, bias: torch.Tensor, overlap: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixture A and offset c, by L-BFGS from `start`."""
    old = torch.relu(linear + bias)
    total = _size(old, overlap).clamp(min=1e-30)
    scale = start.norm(dim=1, keepdim=True).clamp(min=1e-30)
    mixture = (start / scale).clone().requires_grad_()
    offset = (start @ bias / scale[:, 0]).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([mixture, offset], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        new = torch.relu(linear @ mixture.T + offset)
        loss = _size(new @ _solve(new, old) - old, overlap) / total
        loss.backward()
        return loss.item()

    with torch.enable_grad():
        optimizer.step(closure)
    return mixture.detach(), offset.detach()
