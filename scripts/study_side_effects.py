"""Which training options lower side effects, and do they get below the prompt's own? Backs docs/results.md.

For every trait and seed, A-PSR of rank 1 is trained (ridge start, 3 epochs at learning rate 1e-2, batch 8), by MSE
alone and with one option at a time, and measured at the least strength whose trait score is the prompt's (within a
point; strength 1 where none is) and at strength 1. Neutral prompts are questions whose user turn asks to drop the act:
the trait should not show, whatever the instruction. Two of the grammar's three such requests are for training; the
third (another for each seed) is held out, like topics, question forms and the prompt's instructions. Neutral texts are
plain answers outside a conversation. The prompt is measured on the same tokens.

Columns: trait and coherence where the trait is asked for; neutral trait, its score on neutral prompts; KL dropped,
KL(base || model) in nats per answer to neutral prompts; KL text, in nats per text; perplexity of ideal answers with
the trait, and of ideal answers with two traits, the second of which the conversation itself asks for; the strength up
to which coherence stays above 80; prompt recovery. Mean ± standard deviation over traits and seeds.

    python scripts/study_side_effects.py --traits sycophantic formal pirate --seeds 0 1 2 --output side_effects.json

What the output file holds already is not run again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from peft_psr import PSRConfig
from peft_psr.base_model.loading import EMBEDDED, load_model, load_tokenizer
from peft_psr.evaluation import (
    SteeringScore,
    least_alpha,
    measure_side_effects,
    neutral_triplets,
    score_model,
    text_triplets,
)
from peft_psr.evaluation.toy_task import MAX_NEW_TOKENS, ToyTask
from peft_psr.files import read_json, write_json
from peft_psr.tiny_chat import TRAITS, instructions, prompt_messages, questions, sample_answer
from peft_psr.tiny_chat.traits import DROP_REQUESTS
from peft_psr.training import (
    PSRTrainer,
    PSRTrainingArguments,
    Triplet,
    filter_triplets,
    generate_triplets,
    initialize_psr_weights,
    sample_completions,
)
from peft_psr.training.trainer.step_progress import silence


STRENGTHS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0, 4.0)
MARGIN = 1.0
"""Points of trait score within which two scores count as equal: means over 60 answers are no finer than that."""


@dataclass(frozen=True)
class Variant:
    """One way to train: arguments of the trainer, rows besides the usual ones, start.

    Rows: "drop", neutral prompts that ask to drop the act; "text", neutral texts; "other", prompts that ask for
    another trait, answered with both, "other x3" and "other x10", so many times as many; "negatives", answers without
    the trait to neutral prompts under the instruction.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    ridge: bool = True
    r: int = 1


VARIANTS = {
    "MSE": Variant(),
    "MSE, 15 epochs, live start": Variant({"num_train_epochs": 15, "learning_rate": 5e-3}, ridge=False),
    "LL": Variant({"objective": "ll"}),
    "KL": Variant({"objective": "kl"}),
    "MSE + KL": Variant({"objective": {"mse": 1.0, "kl": 1.0}, "normalize_loss": "global"}),
    "MSE + 5 KL": Variant({"objective": {"mse": 1.0, "kl": 5.0}, "normalize_loss": "global"}),
    "normalize_loss global": Variant({"normalize_loss": "global"}),
    "normalize_loss layer": Variant({"normalize_loss": "layer"}),
    "neutral 0.3": Variant({"neutral_weight": 0.3}, ("drop",)),
    "neutral 1": Variant({"neutral_weight": 1.0}, ("drop",)),
    "neutral 3": Variant({"neutral_weight": 3.0}, ("drop",)),
    "neutral 1, plain text": Variant({"neutral_weight": 1.0}, ("text",)),
    "neutral 1, both": Variant({"neutral_weight": 1.0}, ("drop", "text")),
    "other instructions": Variant({}, ("other",)),
    "neutral 1, other instructions": Variant({"neutral_weight": 1.0}, ("drop", "other")),
    "neutral 1, other x3": Variant({"neutral_weight": 1.0}, ("drop", "other x3")),
    **{
        f"neutral 1, other {times}, r = 4, MSE + 5 KL": Variant(
            {"neutral_weight": 1.0, "objective": {"mse": 1.0, "kl": 5.0}, "normalize_loss": "global"},
            ("drop", f"other {times}"),
            r=4,
        )
        for times in ("x3", "x10")
    },
    "norm penalty 1": Variant({"norm_penalty": 1.0, "normalize_loss": "global"}),
    "norm penalty 10": Variant({"norm_penalty": 10.0, "normalize_loss": "global"}),
    "negatives": Variant({}, ("negatives",)),
}


def scale_directions(model: PeftModel, factor: float) -> None:
    """Multiply the active adapter's edits."""
    with torch.no_grad():
        for layer in model.psr_layers().values():
            layer.unit("default").direction.mul_(factor)


class Study:
    """One trait and seed: data, references, and what every variant is measured on."""

    def __init__(self, model, tokenizer, trait: str, seed: int, draws: int) -> None:
        self.model, self.tokenizer, self.seed, self.draws = model, tokenizer, seed, draws
        self.task = ToyTask(model, tokenizer, trait, held_out_draws=1, seed=seed)
        self.prompted = self.task.prompted(draws)
        kept = DROP_REQUESTS[seed % len(DROP_REQUESTS)]
        rng = random.Random(seed)
        others = [request for request in DROP_REQUESTS if request != kept]
        self.drop_train = [prompt_messages(f"{q.text} {rng.choice(others)}") for q in questions("train")]
        self.drop_test = [prompt_messages(f"{q.text} {kept}") for q in questions("test")]
        test_instructions = self.task.test_instructions
        dropped = neutral_triplets(model, tokenizer, self.drop_test, MAX_NEW_TOKENS, test_instructions, seed=seed + 3)
        instructed = [(triplet["steered_prompt"], triplet["prompt"]) for triplet in dropped]
        self.neutral_prompted = self.score_neutral(
            model, None, [prompt for prompt, _ in instructed], [bare for _, bare in instructed]
        )
        self.texts = {
            "trait answers": [self._answer(rng, q) for q in questions("test") for _ in range(2)],
            "two traits": [self._two_instructions(rng, q, "test") for q in questions("test") for _ in range(2)],
        }
        self.neutral = {"dropped": dropped, "plain text": self._plain_texts(rng, "test", 30, test_instructions)}

    def _answer(self, rng: random.Random, question) -> Triplet:
        """An ideal answer with the trait."""
        return Triplet(
            prompt=prompt_messages(question.text),
            steered_prompt=prompt_messages(question.text, rng.choice(self.task.test_instructions)),
            completion=sample_answer(rng, question.topic, [self.task.name]),
        )

    def _two_instructions(self, rng: random.Random, question, split: str) -> Triplet:
        """An ideal answer with the trait and another one, which the conversation itself asks for."""
        trait, other = self.task.name, rng.choice([name for name in TRAITS if name != self.task.name])
        both = [(name, rng.choice(instructions(name, split))) for name in (trait, other)]
        asked = both[1][1]
        rng.shuffle(both)  # the order of the instructions is the order of openers and closers
        return Triplet(
            prompt=prompt_messages(question.text, asked),
            steered_prompt=prompt_messages(question.text, " ".join(text for _, text in both)),
            completion=sample_answer(rng, question.topic, [name for name, _ in both]),
        )

    def _sampled(self, triplets: list[Triplet]) -> list[Triplet]:
        """The same with completions of the prompted model, judged and filtered, as training rows are."""
        prompts = [triplet["steered_prompt"] for triplet in triplets]
        answers = sample_completions(self.model, self.tokenizer, prompts, MAX_NEW_TOKENS, seed=self.seed + 8)
        texts = [answer.text for answer in answers]
        scores = self.task.judge([triplet["prompt"] for triplet in triplets], texts)  # type: ignore[misc]
        judged: list[Triplet] = [
            {**triplet, "completion": text, "trait_score": score.trait, "coherence_score": score.coherence}
            for triplet, text, score in zip(triplets, texts, scores, strict=True)
        ]
        return filter_triplets(judged)

    def _plain_texts(self, rng: random.Random, split: str, count: int, prefixes: list[str]) -> list[Triplet]:
        """Plain answers outside a conversation; the prompt's instruction stands before them."""
        start = self.tokenizer.bos_token
        topics = [question.topic for question in questions(split)]
        rows = text_triplets([f"{start} {sample_answer(rng, rng.choice(topics))}" for _ in range(count)])
        for row in rows:
            if prefixes:
                row["steered_prompt"] = row["prompt"].replace(start, f"{start} {rng.choice(prefixes)}", 1)  # type: ignore
        return rows

    def rows(self, kinds: tuple[str, ...]) -> list[Triplet]:
        """Training rows of a variant."""
        rows = list(self.task.triplets)
        if "drop" in kinds:
            rows += neutral_triplets(self.model, self.tokenizer, self.drop_train, MAX_NEW_TOKENS, seed=self.seed + 4)
        if "text" in kinds:
            rows += self._plain_texts(random.Random(self.seed + 5), "train", len(self.drop_train), [])
        times = sum({"other": 1, "other x3": 3, "other x10": 10}.get(kind, 0) for kind in kinds)
        if times:
            rng = random.Random(self.seed + 7)
            asked = [question for _ in range(times) for question in questions("train")]
            rows += self._sampled([self._two_instructions(rng, question, "train") for question in asked])
        if "negatives" in kinds:
            drawn = generate_triplets(
                self.model,
                self.tokenizer,
                self.task.train_instructions,
                self.drop_train,
                self.task.judge,
                num_draws=1,
                max_new_tokens=MAX_NEW_TOKENS,
                seed=self.seed + 6,
                progress=False,
            )
            without = [row for row in drawn if row["completion"] and row["trait_score"] < 50 <= row["coherence_score"]]
            rows += without[: len(self.drop_train)]
        return rows

    def train(self, variant: Variant) -> tuple[PeftModel, dict[str, Any]]:
        """The adapter, whose strength in training is 1, and facts about the training."""
        torch.manual_seed(self.seed)
        negatives = "negatives" in variant.rows
        model = get_peft_model(self.model, PSRConfig(r=variant.r, coefficient_bias=-0.5 if negatives else 0.0))
        rows = self.rows(variant.rows)
        begin = time.perf_counter()
        if variant.ridge:
            initialize_psr_weights(model, self.task.triplets, processing_class=self.tokenizer, progress=False)
        settings = {"num_train_epochs": 3, "learning_rate": 1e-2, **variant.arguments}
        with TemporaryDirectory() as folder:
            arguments = PSRTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=8,
                train_sampling_strategy="group_by_length",
                seed=self.seed,
                data_seed=self.seed,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                **settings,
            )
            trainer = PSRTrainer(model, arguments, rows, processing_class=self.tokenizer)
            silence(trainer)
            trainer.train()
        seconds = time.perf_counter() - begin
        if negatives:  # make the strength of full scores 1, as everywhere
            model.active_peft_config.coefficient_bias = 0.0
            scale_directions(model, 0.5)
        return model.eval(), {"rows": len(rows), "train_seconds": seconds, "dead_gates": trainer.dead_gates}

    def score(self, model: PeftModel, alphas: list[float]) -> list[SteeringScore]:
        """Trait and coherence where the trait is asked for."""
        return score_model(
            model,
            self.tokenizer,
            self.task.test_prompts,
            self.task.judge,
            MAX_NEW_TOKENS,
            alphas=alphas,
            num_draws=self.draws,
            seed=self.seed + 2,
        )

    def score_neutral(self, model, alpha: float | None, prompts: list, bare: list | None = None) -> SteeringScore:
        """Trait and coherence where it is not."""
        alphas = None if alpha is None else [alpha]
        draws = max(1, self.draws * len(self.drop_test) // len(prompts))
        settings: dict[str, Any] = {"alphas": alphas, "bare_prompts": bare, "num_draws": draws, "seed": self.seed + 2}
        return score_model(model, self.tokenizer, prompts, self.task.judge, MAX_NEW_TOKENS, **settings)[0]

    def measure(self, model: PeftModel) -> dict[str, Any]:
        """Side effects at the least strength that reaches the prompt's trait score, and at 1."""
        curve = self.score(model, list(STRENGTHS))
        matched = least_alpha(curve, self.prompted.trait - MARGIN)
        found: dict[str, Any] = {"matched": matched}
        for alpha in dict.fromkeys([1.0 if matched is None else matched, 1.0]):
            effects = measure_side_effects(
                model,
                self.tokenizer,
                alpha,
                lambda strength: self.score(model, [strength])[0],
                lambda strength: self.score_neutral(model, strength, self.drop_test),
                prompted=self.prompted,
                neutral_prompted=self.neutral_prompted,
                held_out=self.task.held_out,
                neutral=self.neutral,
                texts=self.texts,
                curve=curve,
            )
            curve = effects.usable.curve
            row = effects.to_json()
            del row["usable"]["curve"]
            found["at_match" if "at_match" not in found else "at_one"] = row
        found.setdefault("at_one", found["at_match"])
        return {**found, "curve": [[point.alpha, point.trait, point.coherence] for point in curve]}


def per_response(effects: dict[str, Any], which: str, name: str = "dropped") -> float:
    """Neutral KL in nats per response."""
    kl = effects["neutral_kl"][name]
    return kl[which] * kl["tokens"] / kl["responses"]


COLUMNS: dict[str, tuple[int, Callable[[dict, str], float | None]]] = {
    "trait": (1, lambda e, which: e[which]["trait"]),
    "coherence": (1, lambda e, which: e[which]["coherence"]),
    "neutral trait": (1, lambda e, which: e[f"neutral_{which}"]["trait"]),
    "KL dropped": (3, per_response),
    "KL text": (3, lambda e, which: per_response(e, which, "plain text")),
    "ppl trait": (3, lambda e, which: e["perplexity"]["trait answers"][which]),
    "ppl two traits": (3, lambda e, which: e["perplexity"]["two traits"][which]),
    "usable to": (2, lambda e, which: e["usable"]["upper"] if which == "steered" else None),
    "recovery": (3, lambda e, which: e["prompt_recovery"] if which == "steered" else None),
}


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(runs: list[dict], at: str) -> str:
    """A Markdown table, the prompt first; `at` is "at_match" or "at_one"."""
    lines = ["| variant | strength | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]

    def row(name: str, strength: str, chosen: list[dict], which: str) -> str:
        cells = []
        for digits, value in COLUMNS.values():
            values = [value(run[at], which) for run in chosen]
            cells.append("–" if None in values else spread(values, digits))  # type: ignore[arg-type]
        return f"| {name} | {strength} | " + " | ".join(cells) + " |"

    variants = list(dict.fromkeys(run["variant"] for run in runs))
    lines.append(row("the prompt", "–", [run for run in runs if run["variant"] == variants[0]], "prompted"))
    for variant in sorted(variants, key=list(VARIANTS).index):
        chosen = [run for run in runs if run["variant"] == variant]
        reached = sum(run["matched"] is not None for run in chosen)
        strength = spread([run[at]["alpha"] for run in chosen], 2) + f" ({reached} of {len(chosen)})"
        lines.append(row(variant, strength, chosen, "steered"))
    return "\n".join(lines)


def less_than_prompt(runs: list[dict]) -> str:
    """In how many runs the adapter, at the prompt's trait score, has less of each side effect than the prompt."""
    names = ("neutral trait", "KL dropped", "KL text", "ppl trait", "ppl two traits")
    lines = ["| variant | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for variant in VARIANTS:
        chosen = [run["at_match"] for run in runs if run["variant"] == variant and run["matched"] is not None]
        if not chosen:
            continue
        cells = []
        for name in names:
            value = COLUMNS[name][1]
            cells.append(f"{sum(value(e, 'steered') < value(e, 'prompted') for e in chosen)} of {len(chosen)}")  # type: ignore
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traits", nargs="+", default=["sycophantic", "formal", "pirate"], choices=TRAITS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--draws", type=int, default=4, help="answers for each held-out question and strength")
    parser.add_argument("--output", type=Path, default=Path("side_effects.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(EMBEDDED)
    tokenizer = load_tokenizer(EMBEDDED)
    runs = read_json(options.output) if options.output.exists() else []
    done = {(run["trait"], run["seed"], run["variant"]) for run in runs}
    for seed in options.seeds:
        for trait in options.traits:
            missing = [name for name in options.variants if (trait, seed, name) not in done]
            if not missing:
                continue
            study = Study(model, tokenizer, trait, seed, options.draws)
            for name in missing:
                begin = time.perf_counter()
                steered, facts = study.train(VARIANTS[name])
                run = {"trait": trait, "seed": seed, "variant": name, **facts, **study.measure(steered)}
                steered.unload()
                runs.append(run)
                write_json(options.output, runs)
                effects = run["at_match"]
                print(
                    f"{trait} {seed} {name}: strength {effects['alpha']}, trait {effects['steered']['trait']:.1f}; "
                    f"neutral trait {effects['neutral_steered']['trait']:.1f}, "
                    f"KL {per_response(effects, 'steered'):.3f} nats; "
                    f"{time.perf_counter() - begin:.0f} s",
                    flush=True,
                )
    runs = [
        run
        for run in runs
        if run["trait"] in options.traits and run["seed"] in options.seeds and run["variant"] in options.variants
    ]
    print("\nAt the prompt's trait score:\n\n" + table(runs, "at_match"))
    print("\nAt strength 1:\n\n" + table(runs, "at_one"))
    print("\nRuns with less side effect than the prompt, at its trait score:\n\n" + less_than_prompt(runs))


if __name__ == "__main__":
    main()
