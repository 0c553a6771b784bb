"""What a training step costs, piece by piece, against its floor.

    python benchmarks/training_step.py                                           # the embedded model
    python benchmarks/training_step.py --model 135m --only mse --batch 4 --prompts 4 --draws 1
    python benchmarks/training_step.py --model 1b --device cuda --dtype bfloat16 # random weights of that shape

The floor is the frozen model's forward and backward pass over `x y'`, nothing else; a teacher's pass over `x' y'`
comes on top where it is not kept. With one edited layer the layers below it are known: the floor can be undercut.
Times are of an epoch, medians over rounds in which every variant runs once, in random order; ratios are of the same
round. The first epoch fills the cache and compiles. Texts are the embedded model's, whatever the model.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from quiet_trainer import trainer_of
from timing import Stopwatch
from transformers import PreTrainedModel, TrainerCallback
from variants import SHAPES, build_model

from peft_psr import PSRConfig
from peft_psr.base_model.loading import EMBEDDED, load_model, load_tokenizer
from peft_psr.evaluation.toy_task import ToyTask
from peft_psr.files import write_json
from peft_psr.training import Triplet, TripletCollator


EPOCHS = 3
FLOOR = "floor: student forward and backward"
Times = tuple[float | None, float]
"""Seconds of the first epoch, where there is one, and of the last."""


@dataclass(frozen=True)
class Training:
    """One way to train: an objective, the edited layers and the trainer's settings."""

    objective: str
    one_layer: bool
    settings: dict[str, Any] = field(default_factory=dict)


KEPT, EACH_STEP = {"teacher_cache": "memory"}, {"teacher_cache": "none"}
COMPILED, MIXED = {"torch_compile": True}, {"bf16": True}
TRAININGS = {
    "mse, all layers, teacher each step": Training("mse", False, EACH_STEP),
    "mse, all layers, activations kept": Training("mse", False, KEPT),
    "mse, one layer, teacher each step": Training("mse", True, EACH_STEP),
    "mse, one layer, activations kept": Training("mse", True, KEPT),
    "kl, all layers, teacher each step": Training("kl", False, EACH_STEP),
    "kl, all layers, activations kept": Training("kl", False, KEPT),
    "kl, one layer, teacher each step": Training("kl", True, EACH_STEP),
    "kl, one layer, activations kept": Training("kl", True, KEPT),
    "mse, all layers, kept, compiled": Training("mse", False, KEPT | COMPILED),
    "mse, all layers, kept, mixed precision": Training("mse", False, KEPT | MIXED),
    "mse, all layers, kept, compiled, mixed precision": Training("mse", False, KEPT | COMPILED | MIXED),
}


class Epochs(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self, device: torch.device) -> None:
        self.watch = Stopwatch(device)
        self.seconds: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Start."""
        self.watch.lap()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Stop."""
        self.seconds.append(self.watch.lap())


def time_training(training: Training, base: PreTrainedModel, tokenizer, triplets: list[Triplet], batch: int) -> Times:
    """Train a few epochs."""
    torch._dynamo.reset()
    middle = (base.config.num_hidden_layers - 1) // 2
    model = get_peft_model(base, PSRConfig(layers_to_transform=middle if training.one_layer else None))
    clock = Epochs(base.device)
    try:
        with TemporaryDirectory() as folder:
            made = trainer_of(
                model, triplets, None, tokenizer, folder, num_train_epochs=EPOCHS, objective=training.objective,
                per_device_train_batch_size=batch, train_sampling_strategy="group_by_length",
                use_cpu=base.device.type == "cpu", **training.settings,
            )  # fmt: skip
            made.add_callback(clock)
            made.train()
    finally:
        model.unload()
    return clock.seconds[0], clock.seconds[-1]


def frozen_passes(base: PreTrainedModel, tokenizer, triplets: list[Triplet], batch: int) -> dict[str, Callable]:
    """What the frozen model's own passes take, as functions without arguments."""
    collator = TripletCollator(tokenizer)
    encoded = sorted((collator.encode(triplet) for triplet in triplets), key=lambda row: len(row["input_ids"]))
    batches = [collator(encoded[i : i + batch]) for i in range(0, len(encoded), batch)]
    batches = [{name: tensor.to(base.device) for name, tensor in rows.items()} for rows in batches]
    decoder, embeddings = base.get_decoder(), base.get_input_embeddings()

    def student(mixed: bool) -> None:
        with torch.autocast(base.device.type, torch.bfloat16) if mixed else nullcontext():
            for rows in batches:
                inputs = embeddings(rows["input_ids"]).detach().requires_grad_()
                hidden = decoder(inputs_embeds=inputs, attention_mask=rows["attention_mask"], use_cache=False)
                hidden.last_hidden_state.float().sum().backward()

    @torch.no_grad()
    def teacher() -> None:
        for rows in batches:
            ids, mask = rows["teacher_input_ids"], rows["teacher_attention_mask"]
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)

    def timed(run: Callable[[], None]) -> Callable[[], Times]:
        def measure() -> Times:
            watch = Stopwatch(base.device)
            run()
            return None, watch.lap()

        return measure

    return {
        FLOOR: timed(lambda: student(mixed=False)),
        f"{FLOOR}, mixed precision": timed(lambda: student(mixed=True)),
        "teacher forward": timed(teacher),
    }


def table(times: dict[str, list[Times]], tokens: int) -> str:
    """Medians in Markdown."""
    lines = ["| an epoch | seconds | tokens/s | time / floor | first epoch, seconds |", "|---|---|---|---|---|"]
    for name, rounds in times.items():
        ratio = statistics.median(last / floor[1] for (_, last), floor in zip(rounds, times[FLOOR], strict=True))
        seconds = statistics.median(last for _, last in rounds)
        firsts = [first for first, _ in rounds if first is not None]
        first = f"{statistics.median(firsts):.2f}" if firsts else "–"
        lines.append(f"| {name} | {seconds:.2f} | {tokens / seconds:.0f} | {ratio:.2f} | {first} |")
    return "\n".join(lines)


def main() -> None:
    """Time the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(EMBEDDED, *SHAPES), default=EMBEDDED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--only", nargs="+", default=[""], help="ways to train whose names begin so")
    parser.add_argument("--trait", default="sycophantic", help="a trait of the embedded model")
    parser.add_argument("--prompts", type=int, default=20, help="prompts to train on, for each instruction")
    parser.add_argument("--draws", type=int, default=1, help="completions for each of them")
    parser.add_argument("--batch", type=int, default=8, help="triplets a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for all single times")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, load {load:.2f}, torch {torch.__version__}", flush=True)
    embedded = load_model(EMBEDDED).requires_grad_(False)
    tokenizer = load_tokenizer(EMBEDDED)
    triplets = ToyTask(embedded, tokenizer, options.trait, options.prompts, options.draws).triplets
    dtype = getattr(torch, options.dtype)
    base = build_model(options.model, options.device, dtype) if options.model != EMBEDDED else embedded
    base = base.to(options.device, dtype)
    tokens = sum(len(TripletCollator(tokenizer).encode(triplet)["input_ids"]) for triplet in triplets)
    variants: dict[str, Callable[[], Times]] = frozen_passes(base, tokenizer, triplets, options.batch)
    for name, training in TRAININGS.items():
        if name.startswith(tuple(options.only)):
            variants[name] = lambda training=training: time_training(  # type: ignore[misc]
                training, base, tokenizer, triplets, options.batch
            )
    times: dict[str, list[Times]] = {name: [] for name in variants}
    for index in range(options.rounds):
        for name, measure in random.Random(index).sample(list(variants.items()), len(variants)):
            times[name].append(measure())
        print(f"round {index + 1} of {options.rounds}", flush=True)
    print(f"\n{len(triplets)} triplets, {tokens} tokens of x y', batch {options.batch}, {options.rounds} rounds\n")
    print(table(times, tokens))
    if options.output:
        result = {"settings": str(vars(options)), "load": load, "tokens": tokens, "times": times}
        write_json(options.output, result)


if __name__ == "__main__":
    main()
