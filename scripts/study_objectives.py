"""How near does an adapter come to the prompt, by objective, start, rank, layers and gate? Backs docs/results.md.

The model is pretrained and follows no instructions, so it is steered by context (see context_triplets.py). Adapters of
all contexts and seeds train side by side. The learning rate is each variant's own: with the first seed, from 5e-3 and
1e-2 on by factors of two in both directions until the best has a worse neighbour on either side, by prompt recovery on
validation triplets (mean over contexts); the best is then run with the other seeds. Reported: prompt recovery at
alpha 1 on held-out triplets, mean over contexts, mean ± standard deviation over seeds; then each context by itself. No
start shares a character with a start of another split, and nothing is chosen by the held-out triplets.

    python scripts/study_objectives.py --model stories260K --part objectives --output objectives.json

Parts: objectives (objective x start), ranks, gates (gate, one layer or all, positions), aim (what more triplets and
training reach), directions (given and frozen: what is lost), reported (the reported recipe: 15,000 steps at its own
learning rate). What the output file holds
already is not run again. Each run is a `PSRTrainer`'s, on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from context_triplets import ContextTask, context_task
from peft import PeftModel, get_peft_model

from peft_psr import PSRConfig
from peft_psr.base_model.loading import load_model, load_tokenizer
from peft_psr.evaluation import prompt_recovery
from peft_psr.files import read_json, write_json
from peft_psr.training import PSRTrainer, PSRTrainingArguments, initialize_psr_weights
from peft_psr.training.trainer.step_progress import silence


DRAWN = 1000  # training triplets of each context and seed; variants take the first of them
TRIPLETS_FOR_START = 100


@dataclass(frozen=True)
class Variant:
    """What is compared.

    Attributes:
        objective: As `PSRTrainingArguments` takes it, weights as JSON.
        start: "linear" (the reported one); "live" (w = 0, b = 1, z = 0); "open", for ranks that differ (w as linear
            layers start, b = 1, z = 0); "random" (random directions, gates by ridge); or a method of
            `initialize_psr_weights`.
        r: Rank.
        gate: "relu" or "constant".
        layer: The one layer that is edited, or `None` for all.
        positions: Which tokens are edited.
        triplets: How many to train on.
        epochs: Passes over them.
        batch_size: Triplets a step.
        rate: A learning rate, or `None` to tune it.
        frozen: Directions stay as the start has them; gates are trained.
    """

    objective: str = "kl"
    start: str = "live"
    r: int = 1
    gate: str = "relu"
    layer: int | None = None
    positions: str = "response"
    triplets: int = 250
    epochs: int = 2
    batch_size: int = 4
    rate: float | None = None
    frozen: bool = False

    @property
    def key(self) -> str:
        """The settings as text, which names the variant in the results."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "frozen" or value})


STARTS = ("linear", "live", "mean_difference", "ridge")
PARTS = {
    "objectives": [
        *(Variant(objective, start) for objective in ("kl", "mse") for start in STARTS),
        Variant("ll"),
        Variant('{"mse": 1.0, "kl": 1.0}'),
    ],
    "ranks": [
        *(Variant("kl", "open", r=r) for r in (2, 4, 8)),
        Variant("kl", "ridge", r=8),
        Variant("mse", "open", r=8),
    ],
    "directions": [
        *(Variant("kl", start, r=r, frozen=True) for r in (1, 8) for start in ("ridge", "random")),
        Variant("kl", "mean_difference", frozen=True),
        Variant("kl", "random", r=8),
    ],
    "gates": [
        Variant("kl", gate="constant"),
        Variant("mse", gate="constant"),
        *(Variant("kl", layer=layer) for layer in range(5)),
    ],
    "aim": [
        Variant("kl", triplets=1000, epochs=4, batch_size=8, rate=1e-2),
        Variant("kl", positions="all", triplets=1000, epochs=4, batch_size=8, rate=1e-2),
        Variant("kl", "ridge", r=8, triplets=1000, epochs=6, batch_size=8, rate=5e-3),
        Variant("kl", "open", r=8, triplets=1000, epochs=6, batch_size=8, rate=5e-3),
        Variant("kl", "open", r=8, positions="all", triplets=1000, epochs=6, batch_size=8, rate=5e-3),
    ],
    "reported": [Variant("mse", "linear", triplets=1000, epochs=15, batch_size=1, rate=1e-3)],
}
FIRST_RATES = (5e-3, 1e-2)


class Study:
    """Trains variants on stories of several contexts and keeps what came out.

    Args:
        model_folder: The language model.
        contexts: Keys of `context_triplets.CONTEXTS`.
        seeds: Of the triplets, the start and the order; the first is the one to tune with.
        output: JSON file of all results: {variant: {learning rate: {context and seed: result}}}.
    """

    def __init__(self, model_folder: Path, contexts: list[str], seeds: list[int], output: Path) -> None:
        self.model_folder, self.contexts, self.seeds, self.output = model_folder, contexts, seeds, output
        self.tokenizer = load_tokenizer(str(model_folder))
        self.results: dict[str, dict[str, dict[str, Any]]] = read_json(output) if output.exists() else {}
        self.task = cache(self._task)
        self.start = cache(self._start)

    def _task(self, context: str, seed: int) -> ContextTask:
        return context_task(self.model_folder, context, train=DRAWN, seed=seed)

    def _start(self, config: str, method: str, context: str, seed: int) -> dict[str, torch.Tensor]:
        """The adapter's weights before any step, by parameter name."""
        torch.manual_seed(seed)
        base = load_model(str(self.model_folder))
        model = get_peft_model(base, PSRConfig(init_weights=method not in ("linear", "open"), **json.loads(config)))
        if method in ("ridge", "mean_difference"):
            some = self.task(context, seed).train[:TRIPLETS_FOR_START]
            initialize_psr_weights(model, some, method, self.tokenizer, progress=False)
        if method == "random":
            some = self.task(context, seed).train[:TRIPLETS_FOR_START]
            drawn = torch.randn(base.config.num_hidden_layers, model.active_peft_config.r, base.config.hidden_size)
            initialize_psr_weights(model, some, processing_class=self.tokenizer, directions=drawn, progress=False)
        if method == "open":
            for name, weight in model.named_parameters():
                if name.endswith((".direction", ".gate_bias")):
                    torch.nn.init.constant_(weight, float(name.endswith(".gate_bias")))
        return {name: weight.detach().clone() for name, weight in model.named_parameters() if ".psr_unit." in name}

    def run(self, variant: Variant, rate: float, seeds: list[int]) -> None:
        """Train what is not yet there, all contexts and seeds together, and write it down."""
        done = self.results.setdefault(variant.key, {}).setdefault(repr(rate), {})
        jobs = {f"{context}_{seed}": (context, seed) for seed in seeds for context in self.contexts}
        jobs = {name: job for name, job in jobs.items() if name not in done}
        if not jobs:
            return
        begin = time.monotonic()
        model = self._adapters(variant, jobs)
        dead = self._train(model, variant, rate, jobs)
        for name, job in jobs.items():
            task = self.task(*job)
            model.set_adapter(name)
            done[name] = {
                "validation": prompt_recovery(model, task.validation, self.tokenizer),
                "held_out": prompt_recovery(model, task.held_out, self.tokenizer),
                "dead": sum(gate.endswith(f" of {name}") for gate in dead),
            }
        write_json(self.output, self.results)
        got = statistics.mean(done[name]["validation"] for name in jobs)
        print(f"{variant} {rate:g}, {len(jobs)} runs, {time.monotonic() - begin:.0f} s: {got:.3f}", flush=True)

    def _adapters(self, variant: Variant, jobs: dict[str, tuple[str, int]]) -> PeftModel:
        """One adapter a job, named as the job, at its start."""
        model: Any = load_model(str(self.model_folder))
        fields = {"r": variant.r, "gate": variant.gate, "layers_to_transform": variant.layer}
        fields |= {"positions": variant.positions, "freeze_directions": variant.frozen}
        for name, job in jobs.items():
            config = PSRConfig(**fields)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
            with torch.no_grad():
                for parameter, weight in self.start(json.dumps(fields), variant.start, *job).items():
                    model.get_parameter(parameter.replace(".default.", f".{name}.")).copy_(weight)
        return model.eval()

    def _train(self, model: PeftModel, variant: Variant, rate: float, jobs: dict[str, tuple[str, int]]) -> list[str]:
        """Train all adapters; returns the names of their dead gates."""
        with TemporaryDirectory() as folder:
            arguments = PSRTrainingArguments(
                output_dir=folder,
                objective=variant.objective,
                alpha=1.0,
                learning_rate=rate,
                num_train_epochs=variant.epochs,
                per_device_train_batch_size=variant.batch_size,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            data = {name: self.task(*job).train[: variant.triplets] for name, job in jobs.items()}
            trainer = PSRTrainer(model, arguments, data, processing_class=self.tokenizer)
            silence(trainer)
            trainer.train()
        return trainer.dead_gates

    def tune(self, variant: Variant) -> None:
        """Find the learning rate with the first seed, then run all."""
        if variant.rate is None:
            waiting = list(FIRST_RATES)
            while waiting:
                for rate in waiting:
                    self.run(variant, rate, self.seeds[:1])
                best, known = self.best(variant), self.scores(variant)
                waiting = [rate for rate in (best / 2, best * 2) if rate not in known]
        self.run(variant, self.best(variant), self.seeds)

    def scores(self, variant: Variant) -> dict[float, float]:
        """{learning rate: prompt recovery on the validation triplets with the first seed, mean over contexts}."""
        names = [f"{context}_{self.seeds[0]}" for context in self.contexts]
        return {
            float(rate): statistics.mean(done[name]["validation"] for name in names)
            for rate, done in self.results[variant.key].items()
            if all(name in done for name in names)
        }

    def best(self, variant: Variant) -> float:
        """The learning rate of the best score, or the one that is set."""
        if variant.rate is not None:
            return variant.rate
        scores = self.scores(variant)
        return max(scores, key=lambda rate: scores[rate])

    def row(self, variant: Variant) -> list[str]:
        """A table's row: settings, learning rate, held-out prompt recovery, dead gates."""
        done = self.results[variant.key][repr(self.best(variant))]
        held_out = {
            context: [done[f"{context}_{seed}"]["held_out"] for seed in self.seeds] for context in self.contexts
        }
        by_seed = [statistics.mean(values) for values in zip(*held_out.values(), strict=True)]
        dead = sum(done[f"{context}_{seed}"]["dead"] for context in self.contexts for seed in self.seeds)
        start = variant.start + (", directions frozen" if variant.frozen else "")
        cells: list[object] = [variant.objective, start, variant.r, variant.gate]
        cells += ["all" if variant.layer is None else variant.layer, variant.positions, variant.triplets]
        cells += [variant.epochs, variant.batch_size, f"{self.best(variant):g}" + ("" if variant.rate else " (tuned)")]
        cells += [_spread(by_seed), *map(_spread, held_out.values()), dead]
        return [str(cell) for cell in cells]

    def table(self, part: str) -> str:
        """A part's results in Markdown."""
        head = ["objective", "start", "r", "gate", "layers", "positions", "triplets", "epochs", "batch"]
        head += ["learning rate", "held-out recovery", *self.contexts, "dead gates"]
        rows = [self.row(variant) for variant in PARTS[part]]
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def main() -> None:
    """Run parts of the study and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--contexts", nargs="+", default=["snow", "dog", "boat"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("objectives.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options.model, options.contexts, options.seeds, options.output)
    for part in options.part:
        for variant in PARTS[part]:
            study.tune(variant)
        print(study.table(part), flush=True)


if __name__ == "__main__":
    main()
