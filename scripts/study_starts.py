"""How much does the start decide, and does it need any training? Backs docs/results.md, "Starts".

Starts: linear (the reported runs), live (w = 0, b = 1, z = 0: PSRConfig's default), mean_difference and ridge. Each is
trained by MSE at every learning rate and measured before any step and after some epochs, on held-out triplets: prompt
recovery, and the relative RMSE averaged over layers. A start's learning rate is the one with the best prompt recovery
on validation triplets at the end, averaged over tasks and seeds. One layer or all, rank 1 or more, several seeds.

    python scripts/study_starts.py --output starts.json                             # the embedded model
    python scripts/study_starts.py --model FOLDER --output starts_stories.json      # any model, steered by context

Runs that the output holds already are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from context_triplets import CONTEXTS, context_task
from peft import get_peft_model
from transformers import TrainerCallback

from peft_psr import PSRConfig
from peft_psr.base_model.loading import EMBEDDED, load_model, load_tokenizer
from peft_psr.evaluation import prompt_recovery, relative_rmse
from peft_psr.evaluation.toy_task import ToyTask
from peft_psr.files import read_json, write_json
from peft_psr.training import PSRTrainer, PSRTrainingArguments, Triplet, initialize_psr_weights
from peft_psr.training.trainer.step_progress import silence


STARTS = ("linear", "live", "mean_difference", "ridge")
MEASURED_EPOCHS = (0, 1, 5, 15)


class Measures(TrainerCallback):
    """Measures the adapter before training and after the chosen epochs."""

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        self.measure = measure
        self.points: dict[str, dict[str, float]] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Measure the start."""
        self.points["0"] = self.measure()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Measure after the chosen epochs."""
        if round(state.epoch) in MEASURED_EPOCHS:
            self.points[str(round(state.epoch))] = self.measure()


def splits(options: argparse.Namespace, task: str, seed: int, model, tokenizer) -> tuple[list[Triplet], ...]:
    """Triplets to train on, to choose the learning rate by, and to report on."""
    if options.model is not None:
        count = options.triplets
        drawn = context_task(options.model, task, train=count, validation=count // 2, held_out=count // 2, seed=seed)
        return drawn.train, drawn.validation, drawn.held_out
    experiment = ToyTask(model, tokenizer, task, seed=seed)
    return experiment.triplets, experiment.held_out[::2], experiment.held_out[1::2]


def run(model, tokenizer, data: tuple[list[Triplet], ...], setting: dict[str, Any]) -> dict[str, Any]:
    """One training: {"points": {epoch: measures}, "dead": names of dead gates at the end}."""
    train, validation, held_out = data
    seed, begin = setting["seed"], setting["start"]
    layer = (model.config.num_hidden_layers - 1) // 2 if setting["layers"] == "one" else None
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model, PSRConfig(r=setting["r"], layers_to_transform=layer, init_weights=begin != "linear")
    ).eval()
    if begin in ("mean_difference", "ridge"):
        initialize_psr_weights(adapted, train, begin, processing_class=tokenizer, progress=False)

    def measure() -> dict[str, float]:
        adapted.eval()
        return {
            "validation": prompt_recovery(adapted, validation, tokenizer),
            "recovery": prompt_recovery(adapted, held_out, tokenizer),
            "rmse": statistics.mean(relative_rmse(adapted, held_out, tokenizer).values()),
        }

    with TemporaryDirectory() as folder:
        arguments = PSRTrainingArguments(
            output_dir=folder,
            alpha=1.0,
            num_train_epochs=MEASURED_EPOCHS[-1],
            learning_rate=setting["learning_rate"],
            per_device_train_batch_size=8,
            seed=seed,
            data_seed=seed,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = PSRTrainer(adapted, arguments, train, processing_class=tokenizer)
        measures = Measures(measure)
        silence(trainer)
        trainer.add_callback(measures)
        trainer.train()
    adapted.unload()
    return {"points": measures.points, "dead": trainer.dead_gates}


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over tasks and seeds as Markdown, each start at its own best learning rate."""
    epochs = [f"{epoch} epochs" for epoch in MEASURED_EPOCHS]
    lines = [f"| layers | r | start | learning rate | {' | '.join(epochs)} | dead gates | runs |"]
    lines.append("|---|---|---|---|" + "---|" * (len(epochs) + 2))
    for layers, r, start in dict.fromkeys((one["layers"], one["r"], one["start"]) for one in runs):
        of_start = [one for one in runs if (one["layers"], one["r"], one["start"]) == (layers, r, start)]
        ends: dict[float, list[float]] = {}
        for one in of_start:
            ends.setdefault(one["learning_rate"], []).append(one["points"][str(MEASURED_EPOCHS[-1])]["validation"])
        best = max(ends, key=lambda rate: statistics.mean(ends[rate]))
        chosen = [one for one in of_start if one["learning_rate"] == best]
        cells = []
        for epoch in map(str, MEASURED_EPOCHS):
            cells.append(
                " / ".join(_spread([one["points"][epoch][name] for one in chosen]) for name in ("recovery", "rmse"))
            )
        dead = sum(len(one["dead"]) for one in chosen)
        lines.append(f"| {layers} | {r} | {start} | {best:g} | {' | '.join(cells)} | {dead} | {len(chosen)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def main() -> None:
    """Run the study and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a plain language model to steer by context")
    parser.add_argument("--tasks", nargs="+", help="traits of the embedded model, or contexts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--layers", nargs="+", choices=("all", "one"), default=["all", "one"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--triplets", type=int, default=200, help="to train on, with --model; half as many held out")
    parser.add_argument("--output", type=Path, default=Path("starts.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = EMBEDDED if options.model is None else str(options.model)
    model = load_model(name)
    tokenizer = load_tokenizer(name)
    tasks = options.tasks or (["sycophantic", "pirate"] if options.model is None else list(CONTEXTS)[:1])
    runs = read_json(options.output) if options.output.exists() else []
    done = [{name: value for name, value in one.items() if name not in ("points", "dead")} for one in runs]
    data: dict[tuple[str, int], tuple[list[Triplet], ...]] = {}
    for setting in (
        {"task": task, "layers": layers, "r": r, "seed": seed, "start": start, "learning_rate": rate}
        for layers in options.layers
        for r in options.ranks
        for task in tasks
        for seed in options.seeds
        for start in options.starts
        for rate in options.learning_rates
    ):
        if setting in done:
            continue
        key = setting["task"], setting["seed"]
        if key not in data:
            data[key] = splits(options, *key, model, tokenizer)
        runs.append({**setting, **run(model, tokenizer, data[key], setting)})
        write_json(options.output, runs)
        print(*setting.values(), runs[-1]["points"][str(MEASURED_EPOCHS[-1])], flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
