"""How much of training does the ridge start save? Backs docs/results.md, "Starts".

For every trait and seed, A-PSR is trained by MSE for 15 epochs from three starts: linear (the reported runs), live
(w = 0, b = 1, z = 0: PSRConfig's default) and ridge, each at three learning rates. Held-out loss (1 = no steering)
and prompt recovery are taken before any step and after 1, 3, 7 and 15 epochs. The learning rate is each start's own
best by the held-out loss at the end, averaged over traits and seeds.

    python scripts/study_starts.py --output docs/starts.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from peft_psr import PSRConfig, tiny_chat_path
from peft_psr.evaluation import prompt_recovery
from peft_psr.evaluation.demo import tiny_task
from peft_psr.evaluation.experiment import Experiment, Sizes
from peft_psr.training import PSRTrainer, PSRTrainingArguments, initialize_psr_weights


EPOCHS = (0, 1, 3, 7, 15)
STARTS = ("linear", "live", "ridge")
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


class Checkpoints(TrainerCallback):
    """Measures the adapter before training and at the ends of the chosen epochs."""

    def __init__(self, measure) -> None:
        self.measure, self.points = measure, {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the start."""
        self.points[0] = self.measure()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Measure after the chosen epochs."""
        epoch = round(state.epoch)
        if epoch in EPOCHS:
            self.points[epoch] = self.measure()


def run(experiment: Experiment, start: str, learning_rate: float) -> dict:
    """One training: {"points": {epoch: [held-out loss, prompt recovery]}, "dead": dead gates at the end}."""
    torch.manual_seed(experiment.seed)
    model = get_peft_model(experiment.model, PSRConfig(init_weights=start != "linear")).eval()
    if start == "ridge":
        initialize_psr_weights(
            model, experiment.triplets, processing_class=experiment.processing_class, progress=False
        )
    with TemporaryDirectory() as folder:
        arguments = PSRTrainingArguments(
            output_dir=folder,
            normalize_loss="global",
            learning_rate=learning_rate,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            seed=experiment.seed,
            data_seed=experiment.seed,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = PSRTrainer(
            model, arguments, experiment.triplets, experiment.held_out, processing_class=experiment.processing_class
        )

        def measure() -> list[float]:
            with torch.no_grad():
                losses = [
                    (trainer.compute_loss(model, batch).item(), len(batch["alpha"]))
                    for batch in trainer.get_eval_dataloader()
                ]
            loss = sum(value * rows for value, rows in losses) / sum(rows for _, rows in losses)
            return [loss, prompt_recovery(model, experiment.held_out, experiment.processing_class)]

        checkpoints = Checkpoints(measure)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(checkpoints)
        trainer.train()
    dead = trainer.dead_gates
    model.unload()
    return {"points": checkpoints.points, "dead": dead}


def table(runs: list[dict]) -> str:
    """A Markdown table: mean and standard deviation over runs, each start at its own best learning rate."""
    lines = ["| start | learning rate | " + " | ".join(f"{epoch} epochs" for epoch in EPOCHS) + " | dead gates |"]
    lines.append("|---|---|" + "---|" * (len(EPOCHS) + 1))
    for start in STARTS:
        of_start = [run for run in runs if run["start"] == start]
        ends = {
            rate: statistics.mean(run["points"][EPOCHS[-1]][0] for run in of_start if run["learning_rate"] == rate)
            for rate in LEARNING_RATES
        }
        best = min(ends, key=lambda rate: ends[rate])
        chosen = [run for run in of_start if run["learning_rate"] == best]
        cells = []
        for epoch in EPOCHS:
            parts = []
            for k in (0, 1):
                values = [run["points"][epoch][k] for run in chosen]
                parts.append(
                    f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"
                )
            cells.append(" / ".join(parts))
        dead = sum(len(run["dead"]) for run in chosen)
        lines.append(f"| {start} | {best:g} | " + " | ".join(cells) + f" | {dead} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traits", nargs="+", default=["sycophantic", "pirate", "formal"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("starts.json"))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_path())
    runs = []
    for trait in options.traits:
        for seed in options.seeds:
            experiment = Experiment(model, tokenizer, tiny_task(trait), Sizes(score_draws=1), seed)
            experiment.prepare()
            for start in STARTS:
                for rate in LEARNING_RATES:
                    result = run(experiment, start, rate)
                    runs.append({"trait": trait, "seed": seed, "start": start, "learning_rate": rate, **result})
                    print(trait, seed, start, rate, result["points"][EPOCHS[-1]], flush=True)
                    options.output.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
