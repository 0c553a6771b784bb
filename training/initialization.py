"""A start made from the data in one pass, without any gradient step.

Edited layers are set in order. For each, with A (tokens x d) the student's stream at the edited tokens while the
layers before it already do their part, and D what is then still missing,

    D = A_l(x' y') - A

`mean_difference` sets z = mean(D) with open gates (w = 0, b = 1): DiM for a single layer, CAA-like. `ridge` keeps that
z and fits the gate to how much of it each token takes:

    c = (D @ z) / |z|^2 per token;     w, b = argmin sum (A @ w + b - c)^2 + strength * |w|^2

For r > 1, each further z is the main direction of what is left of D and is predictable from A. Measuring D in one pass
for all layers, as Delta_l - Delta_{l-1}, would count twice what a block makes by itself of an edited stream.

Source: docs/results.md of this project; `mean_difference` is the paper's DiM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from peft_psr.layer import PSRUnit

from .branches import layers_downstream, psr_model, run_branch
from .collator import TripletCollator
from .trainer import encode_dataset
from .triplets import Triplet


METHODS = ("ridge", "mean_difference")


@dataclass
class _Moments:
    """Sums over tokens of one layer, float64: all that either method needs, whatever the number of tokens.

    `gram` is sum of a a^T and `cross` sum of a D^T, with a = (A, 1), so that the last row belongs to the bias.
    """

    width: int
    gram: torch.Tensor = field(init=False)
    cross: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.width + 1, self.width + 1, dtype=torch.float64)
        self.cross = torch.zeros(self.width + 1, self.width, dtype=torch.float64)

    def add(self, stream: torch.Tensor, difference: torch.Tensor) -> None:
        ones = stream.new_ones(stream.shape[0], 1)
        inputs = torch.cat([stream, ones], dim=1).double().cpu()
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ difference.double().cpu()

    @property
    def mean_difference(self) -> torch.Tensor:
        return self.cross[-1] / self.gram[-1, -1]


def initialize_psr_weights(
    model: PeftModel,
    dataset: Sequence[Triplet],
    method: str = "ridge",
    processing_class=None,
    ridge_strength: float = 1e-2,
    batch_size: int = 16,
    progress: bool = True,
) -> None:
    """Set the active adapter's weights from triplets, in place. One pass over the data for each edited layer.

    A constant gate takes z from either method; so does "mean_difference" with r > 1, in whose further ranks z stays 0.

    Args:
        model: A PEFT model with an active PSR adapter on decoder layers.
        dataset: Triplets.
        method: "ridge" or "mean_difference".
        processing_class: The tokenizer; `None` loads the one that lies with the model.
        ridge_strength: Weight of |w|^2, relative to the mean square of the stream's features.
        batch_size: Triplets a forward pass.
        progress: Show a progress bar.

    Raises:
        TypeError: the model has no PSR adapter.
        ValueError: an unknown method, an empty data set, or the instruction changes nothing at an edited layer.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    tuner = psr_model(model)
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
    config = model.active_peft_config
    # a strength of 1 in all, whatever the bias
    collator = TripletCollator(processing_class, config.positions, alpha=1.0 - config.coefficient_bias)
    rows = encode_dataset(collator, dataset, "dataset")
    adapter = model.active_adapter
    layers = {layer.name: layer for layer in tuner.psr_layers().values() if adapter in layer.psr_unit}
    names = [name for name in layers_downstream(model) if name in layers]
    loader: Any = DataLoader(rows, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    for name in names:
        layers[name].unit(adapter).reset_parameters(init_weights=True)
    with torch.no_grad(), tqdm(total=len(names) * len(loader), desc=f"{method} start", disable=not progress) as bar:
        for name in names:
            moments = _Moments(layers[name].width)
            for batch in loader:
                batch = {key: tensor.to(device) for key, tensor in batch.items()}
                teacher = run_branch(model, batch, [name], "teacher").hidden[name].float()
                student = run_branch(model, batch, [name], "student").hidden[name].float()
                moments.add(student, teacher - student)
                bar.update()
            unit = layers[name].unit(adapter)
            if method == "mean_difference":
                w, b, z = _mean_difference(moments, unit)
            else:
                w, b, z = _ridge(moments, unit.direction.shape[0], ridge_strength)
            if not z.any():
                raise ValueError(
                    f"The instruction changes nothing at {name}: its activations are equal with and without it on "
                    "every triplet, so there is no direction to start from."
                )
            unit.direction.copy_(z)
            if unit.gate_weight is not None and unit.gate_bias is not None:
                unit.gate_weight.copy_(w)
                unit.gate_bias.copy_(b)


def _mean_difference(moments: _Moments, unit: PSRUnit) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r = unit.direction.shape[0]
    z = torch.zeros(r, moments.width, dtype=torch.float64)
    z[0] = moments.mean_difference
    return torch.zeros_like(z), torch.ones(r, dtype=torch.float64), z


def _ridge(moments: _Moments, r: int, strength: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit w (r, d), b (r,) and z (r, d) to the moments of one layer."""
    gram, cross, width = moments.gram, moments.cross.clone(), moments.width
    penalty = torch.full((width + 1,), strength * gram.diagonal()[:-1].mean().item(), dtype=torch.float64)
    penalty[-1] = 0.0  # the bias is free
    factor = torch.linalg.cholesky(gram + penalty.diag())
    solutions, directions = [], []
    for rank in range(r):
        if rank == 0:
            z = moments.mean_difference
        else:
            # cross now belongs to the residual; what a linear map can say of it has this second moment
            predictable = cross.T @ torch.cholesky_solve(cross, factor)
            z = torch.linalg.eigh(predictable).eigenvectors[:, -1]
        solution = torch.cholesky_solve((cross @ z / z.square().sum().clamp(min=1e-30)).unsqueeze(1), factor)[:, 0]
        cross = cross - torch.outer(gram @ solution, z)
        solutions.append(solution)
        directions.append(z)
    fit = torch.stack(solutions)
    return fit[:, :-1], fit[:, -1], torch.stack(directions)
