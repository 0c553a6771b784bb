"""Adapters combined into one, exactly: their ranks are put side by side.

    sum_a weight_a * (alpha_a + b_a) * (lambda_a @ z_a)  =  lambda @ z,   w, b concatenated, z concatenated and scaled

Each gate keeps its own w and b and reads the same stream as before, so the combination equals the adapters active
together, each at its weight times its strength, on every layer and for any ranks. A constant gate is ReLU(h @ 0 + 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .config import PSRConfig, check_strength
from .layer import PSRUnit


def combined_config(
    configs: Sequence[PSRConfig], ranks: Mapping[str, int], layers: Sequence[int] | None, names: Sequence[str]
) -> PSRConfig:
    """Configuration of the combination, at strength 1.

    Args:
        configs: The adapters' configurations.
        ranks: {name of an edited layer: sum of the ranks of the adapters on it}.
        layers: Numbers of the edited decoder layers, or `None` if some adapter edits other modules.
        names: Names of the edited modules.

    Raises:
        ValueError: the adapters edit different positions or save further modules, which one adapter can't express.
    """
    positions = {config.positions for config in configs}
    if len(positions) > 1:
        raise ValueError(f"Adapters that edit different positions ({sorted(positions)}) can't be combined into one.")
    if any(config.modules_to_save for config in configs):
        raise ValueError("Adapters with `modules_to_save` can't be combined: those modules have no common value.")
    return replace(
        configs[0],
        r=max(ranks.values()),
        gate="constant" if all(config.gate == "constant" for config in configs) else "relu",
        layers_to_transform=None if layers is None else list(layers),
        target_modules=list(names) if layers is None else None,
        exclude_modules=None,
        alpha=1.0,
        coefficient_bias=0.0,
        init_weights=True,
        freeze_directions=False,
    )


@torch.no_grad()
def combine_units(target: PSRUnit, units: Sequence[PSRUnit], factors: Sequence[float]) -> None:
    """Write the side-by-side combination of one layer's units into `target`; ranks left over do nothing.

    Args:
        target: A unit with at least as many ranks as all of `units` together.
        units: The adapters' units at this layer.
        factors: weight * (alpha + b_m) of each.
    """
    for parameter in target.parameters():
        parameter.zero_()
    start = 0
    for unit, factor in zip(units, factors, strict=True):
        end = start + unit.direction.shape[0]
        target.direction[start:end] = factor * unit.direction.to(target.direction.device)
        if target.gate_weight is not None and target.gate_bias is not None:
            if unit.gate_weight is not None and unit.gate_bias is not None:
                target.gate_weight[start:end] = unit.gate_weight.to(target.gate_weight.device)
                target.gate_bias[start:end] = unit.gate_bias.to(target.gate_bias.device)
            else:
                target.gate_bias[start:end] = 1.0
        start = end


def check_weights(adapters: Sequence[object], weights: Sequence[float]) -> list[float]:
    """The weights as floats.

    Raises:
        TypeError: a weight is not a number.
        ValueError: a weight is not finite, or there is not one for each adapter.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Need one weight per adapter, got {len(adapters)} adapters and {len(weights)} weights.")
    return [check_strength(weight, "weight") for weight in weights]


def check_combination(combination_type: str, svd_rank: int | None, samples: Sequence[object] | None) -> None:
    """Raise `ValueError` if a way to combine does not go with what is given for it, as `add_weighted_adapter` says."""
    if combination_type not in ("cat", "svd"):
        raise ValueError(f"combination_type must be 'cat' or 'svd', got {combination_type!r}.")
    cut = combination_type == "svd"
    if cut != (svd_rank is not None) or cut != bool(samples):
        raise ValueError(
            "combination_type='svd' takes svd_rank and samples, and nothing else does: a rank is cut by a fit to "
            f"what the adapters do on samples. Got svd_rank={svd_rank!r} and "
            f"{'' if samples else 'no '}samples with {combination_type!r}."
        )
    if svd_rank is not None and (isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank < 1):
        raise ValueError(f"svd_rank must be an int of at least 1, got {svd_rank!r}.")


def edit_factors(configs: Sequence[PSRConfig], weights: Sequence[float]) -> list[float]:
    """What each adapter's direction is multiplied by in the combination: weight * (alpha + b_m)."""
    return [weight * (config.alpha + config.coefficient_bias) for weight, config in zip(weights, configs, strict=True)]
