"""What a training run came to: live and dead gates, losses by layer, time and memory."""

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from peft_psr.base_model.decoder import layer_index
from peft_psr.rows import EACH_ROW


GateKey = tuple[str, str]
"""(layer name, adapter)."""


@dataclass(frozen=True)
class TrainingSummary:
    """The end of a training run, in numbers.

    Attributes:
        steps: Optimiser steps in all.
        seconds: Wall-clock time of this process, a run that was resumed without what went before.
        peak_memory_bytes: Most memory: of the GPU where there is one, else of the process.
        teacher_cache: Where the frozen model's activations were kept: "memory", "disk" or "none".
        losses: Mean of each part of the loss over the last epoch: "mse", "ll", "kl", "regularizer", "norm_penalty";
            of several adapters their mean.
        loss_by_layer: The same of each layer's MSE, {layer: mean squared difference}, or of the first objective that
            has a loss at each layer; empty for others.
        loss_by_adapter: The loss of each adapter where several were trained, over the last epoch.
        live_gates: Share (0-1) of gates that opened at least once in the last two epochs.
        gate_sparsity: Share (0-1) of gate values at edited tokens that were 0 in the last epoch.
        dead_gates: Gates that did not open in the last two epochs, by name.
    """

    steps: int
    seconds: float
    peak_memory_bytes: int
    teacher_cache: str
    losses: dict[str, float]
    loss_by_layer: dict[str, float]
    loss_by_adapter: dict[str, float]
    live_gates: float
    gate_sparsity: float
    dead_gates: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return json.loads(json.dumps(asdict(self)))


class Means:
    """Means of named values, added up on the device; read by `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self.count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one step's values, () each."""
        for name, value in values.items():
            before = self._sums.get(name)
            self._sums[name] = value.detach() if before is None else before + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1
        self.count += 1

    def take(self, device: torch.device) -> tuple[list[str], torch.Tensor]:
        """Names and means (names,), which begin anew."""
        if not self._sums:
            return [], torch.zeros(0, device=device)
        names = list(self._sums)
        means = torch.stack([self._sums[name].to(device).float() / self._counts[name] for name in names])
        self._sums, self._counts, self.count = {}, {}, 0
        return names, means


class GateRecord:
    """Which of the adapters' gates opened, and how often: since the last log, and over the last two epochs."""

    def __init__(self, adapters: Sequence[str]) -> None:
        self._adapters = adapters
        self._since_log: dict[GateKey, torch.Tensor] = {}
        self._epochs: list[dict[GateKey, torch.Tensor]] = [{}, {}]
        self._epoch = 0

    def add(
        self, epoch: int, gates: dict[GateKey, torch.Tensor], counted: torch.Tensor, adapter: torch.Tensor
    ) -> None:
        """Count one step's gates, {key: (tokens, r)}, at the tokens at which the edit could do something.

        These are `counted`, (tokens,) bool; `adapter`, (tokens,) int64, is whose tokens they are, where each row has
        an
        adapter of its own.
        """
        if epoch != self._epoch:
            self._epoch, self._epochs = epoch, [self._epochs[1], {}]
        for key, values in gates.items():
            chosen = counted.to(values.device)
            seen = (values[chosen] > 0).long()
            if key[1] == EACH_ROW:
                owner, owners = adapter.to(values.device)[chosen], len(self._adapters)
                opened = seen.new_zeros(owners, seen.shape[1]).index_add(0, owner, seen)
                looked_at = torch.bincount(owner, minlength=owners)[:, None].expand_as(opened)
            else:
                opened = seen.sum(dim=0, keepdim=True)
                looked_at = torch.full_like(opened, len(seen))
            counts = torch.stack([opened, looked_at])
            for record in (self._since_log, self._epochs[1]):
                record[key] = counts + record.get(key, 0)

    def since_log(self) -> dict[GateKey, torch.Tensor]:
        """{key: (2, adapters, r) int64: times that a gate opened, times it was looked at} since the last call."""
        record, self._since_log = self._since_log, {}
        return record

    def last_epoch(self) -> dict[GateKey, torch.Tensor]:
        """The same over the last epoch."""
        return self._epochs[1]

    def last_two_epochs(self) -> dict[GateKey, torch.Tensor]:
        """The same over the last two."""
        before, last = self._epochs
        return {key: counts + before.get(key, 0) for key, counts in last.items()}

    def names_of_dead(self, counts: dict[GateKey, torch.Tensor]) -> list[str]:
        """A name for each gate that never opened in these counts."""
        return [
            f"layer {layer_index(layer)}, gate {rank}" + (f" of {self._adapters[i]}" if name == EACH_ROW else "")
            for (layer, name), (opened, _) in counts.items()
            for i, times in enumerate(opened.tolist())
            for rank, count in enumerate(times)
            if not count
        ]


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def sum_up(
    means: dict[str, float], recent: dict[GateKey, torch.Tensor], last: dict[GateKey, torch.Tensor], **others: Any
) -> TrainingSummary:
    """The summary of a run, `others` its other fields.

    `means` are of the last epoch: parts of the loss by name, "<objective>/layer_<l>", "loss/<adapter>"; `recent` and
    `last` are gates in the last two epochs and the last, as `GateRecord` counts them.
    """
    by_layer: dict[str, float] = {}
    for name, mean in means.items():
        if "/layer_" in name and not name.startswith("loss/"):
            by_layer.setdefault(name.split("/layer_")[1], mean)
    live = [bool(times) for opened, _ in recent.values() for times in opened.flatten().tolist()]
    opened, looked_at = (sum(int(counts[i].sum()) for counts in last.values()) for i in (0, 1))
    return TrainingSummary(
        losses={name: mean for name, mean in means.items() if "/" not in name},
        loss_by_layer=by_layer,
        loss_by_adapter={name.removeprefix("loss/"): mean for name, mean in means.items() if name.startswith("loss/")},
        live_gates=sum(live) / max(1, len(live)),
        gate_sparsity=1.0 - opened / max(1, looked_at),
        **others,
    )
