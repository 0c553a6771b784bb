"""How many completions a second local sampling makes in batches, compared with one at a time.

    python benchmarks/sampling.py --model MODEL --batch-sizes 8 64

Prints Markdown. Each round draws the same completions once for each batch size, in random order; what is compared is
each one's time over that of one at a time in the same round, and the median of these ratios is shown. The texts are
compared too: in float32 they are the same.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from peft_psr.base_model.loading import EMBEDDED, load_model, load_tokenizer
from peft_psr.files import write_json
from peft_psr.training import LocalSampler
from peft_psr.training.data.draws import Completion, Draw, draws_on
from peft_psr.training.runs.triplets.assembly import prompt_pairs
from peft_psr.training.runs.triplets.recipe import load_recipe


def draws(recipe: str, count: int, seed: int) -> list[Draw]:
    """So many draws of a recipe that ships, chosen at random from its prompts."""
    pairs = prompt_pairs(load_recipe(recipe))
    every = [draw for pair in pairs for draw in draws_on(pair, -(-count // len(pairs)), seed)]
    return random.Random(seed).sample(every, count)


def timed(sampler: LocalSampler, batch_size: int, asked: list[Draw]) -> tuple[float, dict[str, str]]:
    """Seconds, and the texts by draw."""
    sampler.batch_size = batch_size
    start = time.perf_counter()
    texts = {draw.id: sample.text for draw, sample in sampler(asked) if isinstance(sample, Completion)}
    return time.perf_counter() - start, texts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="Hub name or folder")
    parser.add_argument("--recipe", default="embedded", help="whose prompts are used")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-map", default="auto")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    model = load_model(arguments.model, dtype=arguments.dtype, device_map=arguments.device_map)
    sampler = LocalSampler(model, load_tokenizer(arguments.model), arguments.max_new_tokens)
    asked = draws(arguments.recipe, arguments.completions, arguments.seed)
    sizes = [1, *arguments.batch_sizes]
    dice, ratios = random.Random(arguments.seed), {size: [] for size in sizes}
    seconds, equal = {size: [] for size in sizes}, dict.fromkeys(sizes, 0)
    timed(sampler, max(sizes), asked[: max(sizes)])  # the first call of all is slower
    for _ in range(arguments.rounds):
        found = {size: timed(sampler, size, asked) for size in dice.sample(sizes, len(sizes))}
        for size, (duration, texts) in found.items():
            seconds[size].append(duration)
            ratios[size].append(found[1][0] / duration)
            equal[size] = sum(texts[name] == text for name, text in found[1][1].items())
    results = [
        {
            "batch_size": size,
            "completions_per_second": len(asked) / statistics.median(seconds[size]),
            "times_one_at_a_time": statistics.median(ratios[size]),
            "same_texts": equal[size] / len(asked),
        }
        for size in sizes
    ]
    print(
        f"{len(asked)} completions of at most {arguments.max_new_tokens} tokens, {sampler.describe()['dtype']}, "
        f"{model.device.type}, median of {arguments.rounds} rounds\n"
    )
    print("| batch | completions/s | times one at a time | same texts |\n| ---: | ---: | ---: | ---: |")
    for row in results:
        print(
            f"| {row['batch_size']} | {row['completions_per_second']:.2f} | {row['times_one_at_a_time']:.1f} | "
            f"{row['same_texts']:.0%} |"
        )
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
