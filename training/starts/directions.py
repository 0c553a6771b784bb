"""Directions that are given: checked, and laid out by layer.

Such as rows of a sparse autoencoder's decoder, each a direction in the residual stream that means something by itself.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from peft_psr.files import check_file


Directions = torch.Tensor | Mapping[Any, torch.Tensor] | str | os.PathLike
"""(r, d) for every edited layer, (layers, r, d) in their order, {layer: (r, d)}, or a safetensors file with the key
"directions" for one of the first two, or with layers as keys ("0", "1", ...)."""


def directions_by_layer(directions: Directions, shapes: Mapping[int | str, tuple[int, ...]]) -> dict:
    """Directions (r, d), float64, of each edited layer; `shapes` are the adapter's {layer: (r, d)} in model order.

    Raises:
        FileNotFoundError: no such file.
        TypeError: neither tensors nor a file's name.
        ValueError: layers or shapes are not the adapter's, a direction is 0 or not finite, or those of a layer depend
            on each other; the message says which.
    """
    source = "directions"
    if isinstance(directions, str | os.PathLike):
        source = f"directions in {os.fspath(directions)}"
        check_file(directions, "directions")
        directions = _from_file(directions, source)
    if isinstance(directions, torch.Tensor):
        count = len(shapes)
        if directions.dim() == 3 and directions.shape[0] != count:
            raise ValueError(
                f"{source} are for {directions.shape[0]} layers, {tuple(directions.shape)}, and the adapter edits "
                f"{count}: {', '.join(map(str, shapes))}. Give one (r, d) a layer, in that order."
            )
        parts = directions if directions.dim() == 3 else [directions] * count
        directions = dict(zip(shapes, parts, strict=True))  # type: ignore[arg-type]
    if not isinstance(directions, Mapping):
        raise TypeError(
            f"directions must be a tensor, tensors by layer or the name of a safetensors file, got {directions!r}."
        )
    if set(directions) != set(shapes):
        raise ValueError(
            f"{source} are for the layers {sorted(map(str, directions))}, and the adapter edits "
            f"{sorted(map(str, shapes))}. Give (r, d) for each of these, or choose others with `layers_to_transform`."
        )
    return {layer: _checked(directions[layer], shape, f"{source}, layer {layer}") for layer, shape in shapes.items()}


def _from_file(path: str | os.PathLike, source: str) -> torch.Tensor | dict[int, torch.Tensor]:
    tensors = load_file(path)
    if set(tensors) == {"directions"}:
        return tensors["directions"]
    if not all(key.isdecimal() for key in tensors):
        raise ValueError(
            f"{source} must have the single key 'directions', or numbers of layers as keys; got {sorted(tensors)[:8]}."
        )
    return {int(key): tensor for key, tensor in tensors.items()}


def _checked(z: torch.Tensor, shape: tuple[int, ...], where: str) -> torch.Tensor:
    if not isinstance(z, torch.Tensor):
        raise TypeError(f"{where}: must be a tensor, got {type(z).__name__}.")
    if tuple(z.shape) != shape:
        raise ValueError(f"{where}: the shape must be (r, d) = {shape} as the adapter's, got {tuple(z.shape)}.")
    z = z.detach().double()
    for row in range(shape[0]):
        if not z[row].isfinite().all() or not z[row].any():
            raise ValueError(f"{where}: row {row} is {'0' if z[row].isfinite().all() else 'not finite'}.")
    units = z / z.norm(dim=1, keepdim=True)
    if torch.linalg.matrix_rank(units, rtol=1e-6) < shape[0]:
        raise ValueError(f"{where}: the rows depend on each other, so which of them is used can't be told. Drop some.")
    return z
