"""Outputs of frozen layers, kept from the first time a triplet is met: they are the same in every epoch.

Where the activations of all triplets fit the budget they are kept in memory, or in a file that is mapped to memory;
else they are computed each time. `plan_cache` decides and says so.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

PLACES = ("auto", "memory", "disk", "none")


@dataclass(frozen=True)
class CacheSettings:
    """What the user allows."""

    place: str  # one of `PLACES`
    budget: float  # GB (1e9 bytes) that the activations may take
    folder: Path  # where a file would lie


class ActivationCache:
    """Activations of named layers at some tokens of every triplet.

    Args:
        lengths: How many tokens each triplet has.
        names: The layers.
        width: d.
        dtype: The activations' dtype; they are kept as they come.
        folder: Where to lay the file, for a cache on disk; `None` for memory. The file goes when the cache does.
    """

    def __init__(
        self, lengths: Sequence[int], names: Sequence[str], width: int, dtype: torch.dtype, folder: Path | None = None
    ) -> None:
        self._lengths = torch.tensor(lengths, dtype=torch.long)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._filled = torch.zeros(len(lengths), dtype=torch.bool)
        shape = (len(names), int(self._lengths.sum()), width)
        self._file = None
        if folder is None:
            values = torch.empty(shape, dtype=dtype)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            unlinked = os.name != "nt"  # while it is mapped, so that it can't outlive the process
            self._file = tempfile.NamedTemporaryFile(dir=folder, prefix=".activations-", delete=not unlinked)
            size = shape[0] * shape[1] * shape[2]
            values = torch.from_file(self._file.name, shared=True, size=size, dtype=dtype).view(shape)
            if unlinked:
                os.unlink(self._file.name)
        self._values = dict(zip(names, values, strict=True))

    def holds(self, triplets: torch.Tensor) -> torch.Tensor:
        """Which of these triplets' activations are there: (batch,) bool for (batch,) int64."""
        return self._filled[triplets.cpu()]

    def put(self, triplets: torch.Tensor, activations: Mapping[str, torch.Tensor]) -> None:
        """Keep {layer name: (tokens of these triplets, row after row, d)}."""
        tokens = self._tokens(triplets)
        for name, values in self._values.items():
            values[tokens] = activations[name].detach().to(values.device, values.dtype)
        self._filled[triplets.cpu()] = True

    def get(self, triplets: torch.Tensor, devices: Mapping[str, torch.device]) -> dict[str, torch.Tensor]:
        """{layer name: (tokens of these triplets, row after row, d)}, each on the device that is named for it."""
        tokens = self._tokens(triplets)
        return {name: values[tokens].to(devices[name]) for name, values in self._values.items()}

    def _tokens(self, triplets: torch.Tensor) -> torch.Tensor:
        chosen = triplets.cpu()
        spans = zip(self._starts[chosen].tolist(), self._lengths[chosen].tolist(), strict=True)
        return torch.cat([torch.arange(start, start + length) for start, length in spans])


def plan_cache(settings: CacheSettings, size: int, reason: str | None) -> str:
    """Where to keep activations of `size` bytes: "memory", "disk" or "none"; said in the log.

    `reason` says why nothing can be kept in this run, if so.

    Raises:
        ValueError: the user asked for a place where they do not fit, or where nothing can be kept.
    """
    place, budget, folder = settings.place, settings.budget, settings.folder
    needed = f"{size / 1e9:.2f} GB"
    if place != "auto" and place != "none":
        if reason is not None:
            raise ValueError(f"teacher_cache={place!r} can't be had: {reason}. Use teacher_cache='none'.")
        if size > budget * 1e9:
            raise ValueError(
                f"teacher_cache={place!r} would take {needed}, more than teacher_cache_gb={budget:g}. Raise the "
                "budget, or use teacher_cache='none' to compute the activations each time."
            )
        if place == "disk":
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if size > free:
                raise ValueError(f"teacher_cache='disk' would take {needed}; {folder} has {free / 1e9:.2f} GB left.")
    elif place == "auto":
        place = "memory" if reason is None and size <= budget * 1e9 else "none"
        if reason is None and place == "none":
            reason = f"they would take {needed}, more than teacher_cache_gb={budget:g}"
    if place == "none":
        logger.info("The frozen model's activations are computed at every step%s.", f": {reason}" if reason else "")
    else:
        logger.info("The frozen model's activations are computed once and kept (%s in %s).", needed, place)
    return place
