"""Times variants side by side and compares each with the base of the same round.

A round times every variant once, in random order, so that what slows the machine down for a while slows all of them;
what is compared is each variant's time over the base's in that round, and the median of these ratios over all rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from variants import Variant, call, token_positions


@dataclass(frozen=True)
class Workload:
    """What one timing runs: a prompt in one call, then tokens one by one, greedily.

    Attributes:
        input_ids: The prompt, (batch, prompt).
        new_tokens: Tokens after it.
        generate: Also time the model's own `generate`.
    """

    input_ids: torch.Tensor
    new_tokens: int
    generate: bool = False

    @property
    def length(self) -> int:
        """Tokens of a row when all is done."""
        return self.input_ids.shape[1] + self.new_tokens


def static_cache(model: PreTrainedModel, task: Workload) -> StaticCache:
    """A cache of fixed size, as compiled models need it; allocated now, since that can't be traced."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=task.length)
    batch = task.input_ids.shape[0]
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


def empty_cache(model: PreTrainedModel, cache: StaticCache | None) -> Cache:
    """The given static cache without content, or a new dynamic one."""
    if cache is None:
        return DynamicCache(config=model.config)
    cache.reset()
    return cache


class Stopwatch:
    """Seconds between calls, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Seconds since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.now = getattr(self, "now", 0.0), time.perf_counter()
        return self.now - before


@torch.no_grad()
def time_variant(variant: Variant, task: Workload, cache: Cache) -> dict[str, float]:
    """Seconds for the prompt ("prefill"), for each further token ("decode"), and for "generate" as a whole."""
    ids, (batch, prompt) = task.input_ids, task.input_ids.shape
    positions = token_positions(batch, task.length, ids.device)
    prompt_positions = positions[:, :prompt].contiguous()
    later_positions = [position.contiguous() for position in positions[:, prompt:].split(1, dim=1)]
    watch = Stopwatch(ids.device)
    token = call(variant, ids, prompt_positions, cache)[:, -1].argmax(-1, keepdim=True)
    seconds = {"prefill": watch.lap()}
    for position in later_positions:
        token = call(variant, token, position, cache)[:, -1].argmax(-1, keepdim=True)
    seconds["decode"] = watch.lap() / task.new_tokens
    if task.generate:
        variant.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=task.new_tokens,
            min_new_tokens=task.new_tokens,
        )
        seconds["generate"] = watch.lap()
    return seconds


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not inside the context."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_rounds(
    model: PreTrainedModel,
    variants: Mapping[str, Variant],
    task: Workload,
    rounds: int,
    caches: Mapping[str, StaticCache | None],
    order: random.Random,
) -> dict[str, dict[str, list[float]]]:
    """{variant: {quantity: seconds of each round}}; every round in another random order."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            cache = empty_cache(model, caches[name])
            with no_garbage_collection():
                measured = time_variant(variants[name], task, cache)
            for quantity, value in measured.items():
                seconds[name].setdefault(quantity, []).append(value)
    return seconds


@dataclass(frozen=True)
class Interval:
    """A median with its bootstrapped 95 % interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float], resamples: int = 4000) -> Interval:
    """The median of `values`, and the middle 95 % of the medians of samples drawn from them with replacement."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = data[torch.randint(len(data), (resamples, len(data)), generator=generator)]
    low, high = drawn.quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(data.quantile(0.5)), low, high)


def ratio(seconds: Sequence[float], base: Sequence[float], over: Sequence[float] | None = None) -> Interval:
    """Time over the base's, round by round; with `over`, what exceeds that variant, in units of the base's time."""
    if over is None:
        return median_interval([value / unit for value, unit in zip(seconds, base, strict=True)])
    return median_interval([(value - floor) / unit for value, floor, unit in zip(seconds, over, base, strict=True)])


class OperationCounter(TorchDispatchMode):
    """Counts the tensor operations run inside it, views left out: about the kernels a GPU would launch."""

    views = (torch.ops.aten._unsafe_view.default,)  # a view in all but name

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, and count it."""
        self.count += not (func.is_view or func in self.views)
        return func(*args, **(kwargs or {}))


def count_operations(model: PreTrainedModel, variant: Variant, task: Workload) -> int:
    """Tensor operations of one decoding step."""
    cache = empty_cache(model, None)
    ids, batch = task.input_ids, task.input_ids.shape[0]
    positions = token_positions(batch, ids.shape[1], ids.device)
    call(variant, ids[:, :-1], positions[:, :-1], cache)
    with OperationCounter() as counter:
        call(variant, ids[:, -1:], positions[:, -1:], cache)
    return counter.count
