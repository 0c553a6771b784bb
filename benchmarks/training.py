"""What training costs: the reported recipe in a plain loop against ours, and many adapters at once.

    python benchmarks/training.py target                    # seconds to the naive recipe's final held-out loss
    python benchmarks/training.py together                  # seconds a trait as more traits share a run

On the embedded model. Times are medians over rounds in which every variant runs once, in random order; ratios are of
the same round. Use an idle machine. What a step costs is in `training_step.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from quiet_trainer import trainer_of
from transformers import PreTrainedModel, TrainerCallback

from peft_psr import PSRConfig
from peft_psr.base_model.loading import EMBEDDED, load_model, load_tokenizer
from peft_psr.evaluation.toy_task import ToyTask
from peft_psr.files import write_json
from peft_psr.training import PSRTrainer, Triplet, TripletCollator, initialize_psr_weights


# ---------------------------------------------------------------- the naive recipe


class NaiveAdapter(torch.nn.Module):
    """The paper's edit of every layer by plain hooks, started as a linear layer starts."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        bound = width**-0.5
        self.w = torch.nn.Parameter(torch.empty(layers, width).uniform_(-bound, bound))
        self.b = torch.nn.Parameter(torch.empty(layers).uniform_(-bound, bound))
        self.z = torch.nn.Parameter(torch.empty(layers, width).uniform_(-bound, bound))

    @contextmanager
    def on(self, model: PreTrainedModel, count: int, alpha: float, hidden: list) -> Iterator[None]:
        """Inside, the last `count` tokens are edited; `hidden` collects every layer's output there."""

        def hook(i: int) -> Callable:
            def edit(module, args, output):
                tail = output[:, -count:]
                tail = tail + alpha * F.relu(tail @ self.w[i] + self.b[i])[..., None] * self.z[i]
                hidden.append(tail)
                return torch.cat([output[:, :-count], tail], dim=1)

            return edit

        handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(model.model.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def naive_recipe(model: PreTrainedModel, rows: list[dict], epochs: int, seed: int) -> tuple[NaiveAdapter, float]:
    """The reported recipe, one triplet a step, the teacher anew each time; the adapter and its seconds."""
    torch.manual_seed(seed)
    adapter = NaiveAdapter(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=1e-6)
    steps = epochs * len(rows)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = random.Random(123)
    begin = time.perf_counter()
    for _ in range(epochs):
        for row in order.sample(rows, len(rows)):
            count = row["mask_length"]
            with torch.no_grad():
                ids = torch.tensor([row["teacher_input_ids"]])
                states: list[torch.Tensor] = []
                handles = [
                    layer.register_forward_hook(lambda m, a, o, states=states: states.append(o))
                    for layer in model.model.layers
                ]
                model(ids, use_cache=False)
                for handle in handles:
                    handle.remove()
            hidden: list[torch.Tensor] = []
            with adapter.on(model, count, row["alpha"], hidden):
                model(torch.tensor([row["input_ids"]]), use_cache=False)
            loss = sum(F.mse_loss(ours, theirs[:, -count:]) for ours, theirs in zip(hidden, states, strict=True))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return adapter, time.perf_counter() - begin


# ---------------------------------------------------------------- ours


def held_out_loss(made: PSRTrainer) -> float:
    """Mean MSE, summed over layers, of a triplet held out."""
    total = count = 0.0
    with torch.no_grad():
        for batch in made.get_eval_dataloader():
            rows = len(batch["alpha"])
            total += rows * made.compute_loss(made.model, batch).item()
            count += rows
    return total / count


class UntilTarget(TrainerCallback):
    """Stops training once the held-out loss is as low as the target; the clock stands still while it is measured."""

    def __init__(self, made: PSRTrainer, target: float, every: int, begin: float) -> None:
        self.made, self.target, self.every = made, target, every
        self.begin, self.paused, self.curve = begin, 0.0, []

    def look(self, control) -> None:
        """Measure the loss and stop if it will do."""
        now = time.perf_counter()
        loss = held_out_loss(self.made)
        self.curve.append((now - self.begin - self.paused, loss))
        self.paused += time.perf_counter() - now
        control.should_training_stop = loss <= self.target

    def on_train_begin(self, args, state, control, **kwargs):
        """The start itself may do."""
        self.look(control)

    def on_step_end(self, args, state, control, **kwargs):
        """Look every few steps."""
        if state.global_step % self.every == 0:
            self.look(control)

    @property
    def seconds(self) -> float | None:
        """Seconds until the target was met, or `None`."""
        return self.curve[-1][0] if self.curve[-1][1] <= self.target else None


WAYS: dict[str, dict[str, Any]] = {
    "reported recipe, PSRTrainer": {"init_weights": False, "learning_rate": 1e-3, "batch": 1, "teacher_cache": "none"},
    "+ kept activations": {"init_weights": False, "learning_rate": 1e-3, "batch": 1},
    "+ batches of 8, lr 1e-2": {"init_weights": False, "learning_rate": 1e-2, "batch": 8},
    "+ ridge start": {"ridge": True, "learning_rate": 1e-2, "batch": 8},
}


def run_way(way: dict[str, Any], base, tokenizer, data: ToyTask, target: float, epochs: int, seed: int) -> dict:
    """One way to train, until the target is met or the epochs are over."""
    torch.manual_seed(seed)
    model = get_peft_model(base, PSRConfig(init_weights=way.get("init_weights", True)))
    try:
        begin = time.perf_counter()
        if way.get("ridge"):
            initialize_psr_weights(model, data.triplets, processing_class=tokenizer, progress=False)
        with TemporaryDirectory() as folder:
            made = trainer_of(
                model, data.triplets, data.held_out, tokenizer, folder,
                num_train_epochs=epochs, learning_rate=way["learning_rate"], seed=seed,
                per_device_train_batch_size=way["batch"], teacher_cache=way.get("teacher_cache", "auto"),
                train_sampling_strategy="group_by_length" if way["batch"] > 1 else "random",
            )  # fmt: skip
            steps = max(1, len(data.triplets) // way["batch"])
            clock = UntilTarget(made, target, max(1, steps // 10), begin)
            made.add_callback(clock)
            made.train()
        return {"seconds": clock.seconds, "last": clock.curve[-1], "first_loss": clock.curve[0][1]}
    finally:
        model.unload()


def target_part(options: argparse.Namespace, base: PreTrainedModel, tokenizer) -> dict[str, Any]:
    """Seconds to the naive recipe's final held-out loss."""
    data = ToyTask(base, tokenizer, options.trait, options.prompts, options.draws)
    rows = [TripletCollator(tokenizer).encode(triplet) for triplet in data.triplets]
    print(f"{len(data.triplets)} triplets, {len(data.held_out)} held out, {options.epochs} epochs", flush=True)
    rounds = []
    for index in range(options.rounds):
        naive, seconds = naive_recipe(base, rows, options.epochs, index)
        model = get_peft_model(base, PSRConfig())
        with torch.no_grad():
            for i, layer in model.psr_layers().items():
                unit = layer.unit("default")
                unit.gate_weight.copy_(naive.w[i][None])
                unit.gate_bias.copy_(naive.b[i][None])
                unit.direction.copy_(naive.z[i][None])
        with TemporaryDirectory() as folder:
            target = held_out_loss(trainer_of(model, data.triplets, data.held_out, tokenizer, folder))
        model.unload()
        ways = {
            name: run_way(way, base, tokenizer, data, target, options.epochs, index)
            for name, way in random.Random(index).sample(list(WAYS.items()), len(WAYS))
        }
        rounds.append({"naive": seconds, "target": target, "ways": ways})
        print(json.dumps(rounds[-1]), flush=True)
    lines = ["| way | seconds to the loss | naive / this | held-out loss at the start |", "|---|---|---|---|"]
    naive_seconds = statistics.median(round_["naive"] for round_ in rounds)
    lines.append(f"| naive loop, its {options.epochs} epochs | {naive_seconds:.1f} | 1 | |")
    for name in WAYS:
        of_way = [round_["ways"][name] for round_ in rounds]
        reached = [way["seconds"] for way in of_way]
        start = statistics.median(way["first_loss"] for way in of_way)
        if any(value is None for value in reached):
            last = statistics.median(way["last"][1] for way in of_way)
            lines.append(f"| {name} | not reached ({last:.4f}) | | {start:.4f} |")
            continue
        ratios = [round_["naive"] / round_["ways"][name]["seconds"] for round_ in rounds]
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        lines.append(f"| {name} | {statistics.median(reached):.2f} | {spread} | {start:.4f} |")
    targets = [round_["target"] for round_ in rounds]
    print(f"\nHeld-out loss to reach: {statistics.median(targets):.4f}\n\n" + "\n".join(lines))
    return {"part": "target", "rounds": rounds}


# ---------------------------------------------------------------- many at once


def together_part(options: argparse.Namespace, base: PreTrainedModel, tokenizer) -> dict[str, Any]:
    """Seconds a trait for one epoch at batch 1 a trait, alone and together."""
    data = ToyTask(base, tokenizer, options.trait, options.prompts, options.draws)
    triplets: list[Triplet] = data.triplets
    counts = [1, 2, 4, 8, 16, 32]
    times: dict[int, list[float]] = {count: [] for count in counts}
    for index in range(options.rounds):
        for count in random.Random(index).sample(counts, len(counts)):
            names = [f"trait{i}" for i in range(count)]
            model = get_peft_model(base, PSRConfig(), adapter_name=names[0])
            for name in names[1:]:
                model.add_adapter(name, PSRConfig())
            with TemporaryDirectory() as folder:
                made = trainer_of(
                    model, {name: random.Random(name).sample(triplets, len(triplets)) for name in names}, None,
                    tokenizer, folder, num_train_epochs=2, per_device_train_batch_size=1,
                )  # fmt: skip
                begin = time.perf_counter()
                made.train()
                times[count].append((time.perf_counter() - begin) / 2 / count)
            model.unload()
        print(index, flush=True)
    print(f"\n{len(triplets)} triplets a trait, batch 1 a trait, {options.rounds} rounds\n")
    print("| traits in one run | seconds a trait and epoch | alone / this |\n|---|---|---|")
    for count, values in times.items():
        ratio = statistics.median(alone / value for alone, value in zip(times[1], values, strict=True))
        print(f"| {count} | {statistics.median(values):.2f} | {ratio:.2f} |")
    return {"part": "together", "times": times}


def main() -> None:
    """Run one part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"target": target_part, "together": together_part}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--trait", default="sycophantic", help="a trait of the embedded model")
    parser.add_argument("--prompts", type=int, default=20, help="prompts to train on, for each instruction")
    parser.add_argument("--draws", type=int, default=2, help="completions for each of them")
    parser.add_argument("--epochs", type=int, default=15, help="of the naive recipe, and at most for the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for all single times")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, load {load:.2f}, torch {torch.__version__}")
    base = load_model(EMBEDDED).requires_grad_(False)
    tokenizer = load_tokenizer(EMBEDDED)
    result = parts[options.part](options, base, tokenizer)
    if options.output:
        write_json(options.output, {**result, "settings": str(vars(options)), "load": load})


if __name__ == "__main__":
    main()
