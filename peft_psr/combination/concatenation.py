"""Adapters combined into one, exactly: their ranks are put side by side.

    sum_a weight_a * (alpha_a + b_a) * (lambda_a @ z_a)  =  lambda @ z,   w, b concatenated, z concatenated and scaled

Each gate keeps its own w and b and reads the same stream as before, so the combination equals the adapters active
together, each at its weight times its strength, on every layer and for any ranks. A constant gate is ReLU(h @ 0 + 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from peft_psr.base_model.decoder import layer_index
from peft_psr.config import PSRConfig, check_strength
from peft_psr.unit import PSRUnit


def combine(
    configs: Sequence[PSRConfig], weights: Sequence[float], units: Mapping[str, Sequence[PSRUnit | None]]
) -> tuple[PSRConfig, dict[str, dict[str, torch.Tensor]]]:
    """The combination's configuration, at strength 1, and {name of an edited module: the state of its unit}.

    `units` has for each name of an edited module each adapter's unit there, or `None` if it has none.

    Raises:
        ValueError: the adapters edit different positions or save further modules, which one adapter can't express.
    """
    positions = {config.positions for config in configs}
    if len(positions) > 1:
        raise ValueError(f"Adapters that edit different positions ({sorted(positions)}) can't be combined into one.")
    if any(config.modules_to_save for config in configs):
        raise ValueError("Adapters with `modules_to_save` can't be combined: those modules have no common value.")
    strengths = [config.alpha + config.coefficient_bias for config in configs]
    factors = [weight * strength for weight, strength in zip(weights, strengths, strict=True)]
    parts = {
        module: [(unit, factor) for unit, factor in zip(each, factors, strict=True) if unit is not None]
        for module, each in units.items()
    }
    numbered = numbered_alike(configs)
    config = replace(
        configs[0],
        r=max(sum(unit.direction.shape[0] for unit, _ in there) for there in parts.values()),
        gate="constant" if all(config.gate == "constant" for config in configs) else "relu",
        layers_to_transform=sorted(int(layer_index(module)) for module in units) if numbered else None,
        target_modules=None if numbered else list(units),
        exclude_modules=None,
        alpha=1.0,
        coefficient_bias=0.0,
        init_weights=True,
        freeze_directions=False,
    )
    return config, {module: _side_by_side(there, config) for module, there in parts.items()}


def numbered_alike(configs: Sequence[PSRConfig]) -> bool:
    """Whether the adapters' layers are decoder layers that their numbers tell apart."""
    return all(
        config.target_modules is None and config.layers_pattern == configs[0].layers_pattern for config in configs
    )


@torch.no_grad()
def _side_by_side(parts: Sequence[tuple[PSRUnit, float]], config: PSRConfig) -> dict[str, torch.Tensor]:
    """The state of one layer's combined unit, of units and weight * (alpha + b_m) of each; ranks left over are 0."""
    state = {"direction": torch.cat([factor * unit.direction for unit, factor in parts])}
    if config.gate == "relu":
        weights, biases = zip(*(unit.gate() for unit, _ in parts), strict=True)
        state |= {"gate_weight": torch.cat(weights), "gate_bias": torch.cat(biases)}
    return {name: with_empty_ranks(used, config.r) for name, used in state.items()}


def with_empty_ranks(rows: torch.Tensor, r: int) -> torch.Tensor:
    """Rows of weights, one a rank, and zeros for the ranks up to `r`."""
    return torch.cat([rows, rows.new_zeros(r - len(rows), *rows.shape[1:])])


def check_weights(adapters: Sequence[object], weights: Sequence[float]) -> list[float]:
    """The weights as floats; `ValueError` if there is not one for each adapter, and as `check_strength` raises."""
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
