"""A start made from the data, without any gradient step.

Edited layers are set in order. For each, with A (tokens x d) the student's stream at the edited tokens while the
layers before it already do their part, and D what is then still missing,

    D = A_l(x' y') - A

`mean_difference` sets z = mean(D) with open gates (w = 0, b = 1): DiM for a single layer, CAA-like. `ridge` fits gates
and directions together, or the gates alone where directions are given; see `ridge.py`. `registry.py` lists them all.
Measuring D in one pass for all layers, as Delta_l - Delta_{l-1}, would count twice what a block makes by itself of an
edited stream.

Source: docs/results.md of this project; `mean_difference` is the paper's DiM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from peft_psr.base_model.decoder import layer_index
from peft_psr.base_model.loading import tokenizer_of
from peft_psr.config import check_strength
from peft_psr.layer import PSRUnit
from peft_psr.training.data.collator import TripletCollator
from peft_psr.training.data.context import check_rows
from peft_psr.training.data.dataset import Row, encode_dataset
from peft_psr.training.data.triplets import Triplet
from peft_psr.training.passes.branches import layers_downstream, psr_model
from peft_psr.training.passes.layer_streams import LayerStreams, Tokens
from peft_psr.training.progress import Progress

from .directions import Directions, directions_by_layer
from .registry import STARTS
from .regression import Edit, Moments
from .start import DataStart, Wanted


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def initialize_psr_weights(
    model: PeftModel,
    dataset: Sequence[Triplet],
    method: str = "ridge",
    processing_class: PreTrainedTokenizerBase | None = None,
    ridge_strength: float | None = None,
    directions: Directions | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> None:
    """Set the active adapter's weights from triplets, in place, for a strength alpha of 1.

    Either branch runs about once through the layers up to the last edited one, as long as the hidden states of all
    triplets fit in 4 GB; else once for each edited layer. At d = 2048, r = 4, the sums and the fit of a layer took
    0.7 GB and 14 s of one processor core, strength chosen; memory grows as d^2, time as d^3. They are float64, on the
    layer's device.

    A constant gate gets the mean difference from ridge, too. Ranks that there is no use for start with z = 0 behind
    open gates that differ, so that training can tell them apart.

    Args:
        model: A PEFT model with an active PSR adapter on decoder layers.
        dataset: Triplets; their scores do not matter.
        method: "ridge", "mean_difference", or one that was added to `peft_psr.training.starts.registry.STARTS`.
        processing_class: The tokenizer; `None` loads the one that lies with the model.
        ridge_strength: Penalty on the gates' weights, > 0, relative to the variance of the stream's features. `None`
            chooses it for each layer by the error on held-out triplets, without further passes over the data.
        directions: Directions z to use as they are but for their length and sign, which are fitted: a tensor (r, d)
            for every edited layer, (layers, r, d), {layer: (r, d)}, or a safetensors file with the key "directions" or
            with layers as keys. For example rows of a sparse autoencoder's decoder. With
            `PSRConfig(freeze_directions=True)` training leaves them as they are.
        batch_size: Triplets a forward pass.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: `directions` names no file.
        TypeError: the model has no PSR adapter; a strength or directions of another type.
        ValueError: an unknown method, a strength that is not positive, a coefficient_bias of -1 or less, directions
            that do not fit the adapter, an empty data set, activations that are not finite, or an instruction that
            changes nothing at an edited layer.
    """
    methods = {name: start for name in STARTS if isinstance(start := STARTS[name], DataStart)}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(map(repr, methods))}, got {method!r}.")
    start = methods[method]
    if ridge_strength is not None and check_strength(ridge_strength, "ridge_strength") <= 0:
        raise ValueError(f"ridge_strength must be > 0, got {ridge_strength}; None chooses it by held-out error.")
    tuner = psr_model(model)
    adapter = model.active_adapter
    layers = {layer.name: layer for layer in tuner.psr_layers().values() if adapter in layer.psr_unit}
    names = [name for name in layers_downstream(model) if name in layers]
    units = {name: layers[name].unit(adapter) for name in names}
    given = None
    if directions is not None:
        shapes = {
            layer_index(name): (unit.direction.shape[0], unit.direction.shape[1]) for name, unit in units.items()
        }
        given = directions_by_layer(directions, shapes)
    if processing_class is None:
        processing_class = tokenizer_of(model)
    config = model.active_peft_config
    strength = 1.0 + config.coefficient_bias  # at alpha 1
    if strength <= 0:
        raise ValueError(f"At alpha 1, coefficient_bias={config.coefficient_bias:g} leaves no edit to start from.")
    collator = TripletCollator(processing_class, config.positions, alpha=1.0)
    rows = encode_dataset(collator, dataset, "dataset")
    check_rows(rows, model)
    wanted = Wanted(config.r, config.gate == "relu", ridge_strength)
    folds = fold_of_each(rows, start.folds(wanted))
    streams = LayerStreams(model, collator, rows, batch_size)
    for unit in units.values():
        unit.reset_parameters(init_weights=True)
    with Progress(f"{method} start", len(names) * len(streams), unit="batches", shown=progress) as bar:
        for name, unit in units.items():
            moments = _sums(streams.at(name), folds, layers[name].width, bar)
            if all(sums.square == 0 for sums in moments):
                raise ValueError(
                    f"The instruction changes nothing at {name}: its activations are equal with and without it on "
                    "every triplet, so there is no direction to start from."
                )
            z = None if given is None else given[layer_index(name)].to(moments[0].gram.device)
            _set_weights(unit, start.edit(moments, replace(wanted, directions=z)), strength)


def fold_of_each(rows: Sequence[Row], count: int) -> torch.Tensor:
    """A fold, 0 to `count` - 1, for each triplet: (triplets,) int64; fewer folds where there are fewer triplets.

    Triplets in the order of their prompted tokens are cut into blocks, so that those that share an instruction, or
    start alike, are held out together.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i]["teacher_input_ids"])
    folds = torch.empty(len(rows), dtype=torch.long)
    folds[torch.tensor(order)] = torch.arange(len(rows)) * min(count, len(rows)) // len(rows)
    return folds


def _sums(batches: Iterable[Tokens], folds: torch.Tensor, width: int, bar: Progress) -> list[Moments]:
    """Sums over the tokens of each fold."""
    moments: list[Moments] = []
    for tokens in batches:
        device = tokens.stream.device
        if not moments:
            place = "cpu" if device.type == "mps" else device  # which has no float64
            moments = [Moments.zeros(width, place) for _ in range(int(folds.max()) + 1)]
        fold = folds.to(device)[tokens.triplets]
        for number, sums in enumerate(moments):
            chosen = fold == number
            sums.add(tokens.stream[chosen], tokens.difference[chosen])
        bar.advance()
    return moments


@torch.no_grad()
def _set_weights(unit: PSRUnit, edit: Edit, strength: float) -> None:
    """Write an edit into an adapter's weights at one layer; it is what they do at that strength."""
    unit.direction.copy_(edit.direction / strength)
    if unit.gate_weight is not None and unit.gate_bias is not None:
        unit.gate_weight.copy_(edit.weight)
        unit.gate_bias.copy_(edit.bias)
