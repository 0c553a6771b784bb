"""Two traits in one adapter: what combining keeps, and what a rank cut costs. Backs docs/traits.md.

For every pair of traits, an A-PSR adapter of rank 1 is trained for each (ridge start, MSE), then combined with weights
1 and 1, exactly (rank 2) and cut to rank 1. Each adapter is scored for both traits on held-out questions, and its
distance to the exact combination is given as KL(exact || adapter) per response token, relative to KL(exact || base).

    python scripts/study_combination.py --pairs formal+optimistic pirate+concise --output docs/combination.json
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import get_peft_model

from peft_psr import PSRConfig
from peft_psr.base_model.loading import EMBEDDED, load_model, load_tokenizer
from peft_psr.evaluation.measures.faithfulness import log_probs_at
from peft_psr.evaluation.measures.scoring import score_model
from peft_psr.evaluation.toy_task import MAX_NEW_TOKENS, ToyTask
from peft_psr.files import write_json
from peft_psr.training import PSRTrainer, PSRTrainingArguments, TripletCollator, initialize_psr_weights
from peft_psr.training.judges.grammar import GrammarJudge
from peft_psr.training.trainer.step_progress import silence


def train(model, experiment: ToyTask) -> None:
    """Train the active adapter on the experiment's triplets."""
    tokenizer = experiment.processing_class
    initialize_psr_weights(model, experiment.triplets, processing_class=tokenizer, progress=False)
    with TemporaryDirectory() as folder:
        arguments = PSRTrainingArguments(
            output_dir=folder,
            normalize_loss="global",
            learning_rate=5e-3,
            num_train_epochs=7,
            per_device_train_batch_size=8,
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = PSRTrainer(model, arguments, experiment.triplets, processing_class=tokenizer)
        silence(trainer)
        trainer.train()


def study(model, tokenizer, traits: list[str], draws: int) -> list[dict]:
    """Rows of the table for one pair."""
    experiments = [ToyTask(model, tokenizer, trait) for trait in traits]
    steered = None
    for trait, experiment in zip(traits, experiments, strict=True):
        config = PSRConfig()
        if steered is None:
            steered = get_peft_model(model, config, adapter_name=trait)
        else:
            steered.add_adapter(trait, config)
        steered.set_adapter(trait)
        train(steered, experiment)
    steered.eval()
    collator = TripletCollator(tokenizer, "response", alpha=1.0)
    samples = collator.steering_batches([t for experiment in experiments for t in experiment.triplets])
    held_out = collator.steering_batches([t for experiment in experiments for t in experiment.held_out])
    steered.add_weighted_adapter(traits, [1.0, 1.0], "exact")
    errors = steered.add_weighted_adapter(
        traits, [1.0, 1.0], "cut", combination_type="svd", svd_rank=1, samples=samples
    )

    @torch.no_grad()
    def log_probabilities(adapter: str | None) -> torch.Tensor:
        if adapter is not None:
            steered.set_adapter(adapter)
        found = []
        for batch in held_out:
            off = steered.disable_adapter() if adapter is None else nullcontext()
            with off:
                found.append(log_probs_at(steered(**batch).logits, batch["steering_mask"]))
        return torch.cat(found)

    exact, base = log_probabilities("exact"), log_probabilities(None)

    def distance(other: torch.Tensor) -> float:
        return (exact.exp() * (exact - other)).sum(-1).mean().item()

    rows = []
    for name in (*traits, "exact", "cut"):
        steered.set_adapter(name)
        scores = [
            score_model(
                steered,
                tokenizer,
                experiment.test_prompts,
                GrammarJudge(trait),
                MAX_NEW_TOKENS,
                alphas=[1.0],
                num_draws=draws,
            )[0]
            for trait, experiment in zip(traits, experiments, strict=True)
        ]
        rows.append(
            {
                "pair": "+".join(traits),
                "adapter": name,
                "traits": [score.trait for score in scores],
                "coherence": scores[0].coherence,
                "distance": distance(log_probabilities(name)) / distance(base),
            }
        )
    rows[-1]["error_by_layer"] = {str(layer): error for layer, error in errors.items()}
    steered.unload()
    return rows


def main() -> None:
    """Run the study and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=["formal+optimistic", "pirate+concise"])
    parser.add_argument("--draws", type=int, default=8, help="answers a question")
    parser.add_argument("--output", type=Path, default=Path("combination.json"))
    options = parser.parse_args()
    model = load_model(EMBEDDED)
    tokenizer = load_tokenizer(EMBEDDED)
    rows = []
    for pair in options.pairs:
        rows += study(model, tokenizer, pair.split("+"), options.draws)
        write_json(options.output, rows)
    print("| traits | adapter | first trait | second trait | coherence | distance to the exact combination |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        first, second = row["traits"]
        print(
            f"| {row['pair']} | {row['adapter']} | {first:.1f} | {second:.1f} | {row['coherence']:.1f} | "
            f"{row['distance']:.3f} |"
        )
        if "error_by_layer" in row:
            print("error of the cut by layer:", {k: round(v, 3) for k, v in row["error_by_layer"].items()})


if __name__ == "__main__":
    main()
