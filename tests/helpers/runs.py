"""Runs of the trainer, of `psr train` and of `psr triplets` on tiny models or none."""

from __future__ import annotations

import json
import random

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback

from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import SIX, triplets
from peft_psr import PSRConfig
from peft_psr.training import PSRTrainer, PSRTrainingArguments, add_instruction
from peft_psr.training.data.draws import Completion, Failure, PromptPair
from peft_psr.training.judges.base import Judge, JudgeScores
from peft_psr.training.runs.train.recipe import TrainRecipe
from peft_psr.training.runs.triplets.recipe import load_recipe
from peft_psr.training.runs.triplets.run import FIGURE, MANIFEST, REPORT, TRIPLETS, TripletRun


# ---------------------------------------------------------------- the trainer


def quiet_trainer(model, folder, data=None, held_out=None, callbacks=None, **settings):
    """A `PSRTrainer` on `triplets()` or other data that prints nothing and saves nothing unless told to."""
    arguments = PSRTrainingArguments(
        **{"output_dir": str(folder), "save_strategy": "no", "logging_steps": 1, "use_cpu": True, **settings}
    )
    data = triplets() if data is None else data
    made = PSRTrainer(model, arguments, data, held_out, processing_class=tiny_tokenizer(), callbacks=callbacks)
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    return made


def fresh_trainer(base, folder, layers=None, held_out=None, **settings):
    """A trainer of a new adapter of `base`: three epochs of three steps on six triplets."""
    torch.manual_seed(3)
    model = get_peft_model(base, PSRConfig(layers_to_transform=layers, init_weights=False))
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **settings}
    return quiet_trainer(model, folder, SIX, held_out, **settings)


def trained(*args, **settings):
    """(the adapter's weights, the trainer) of a `fresh_trainer` that has trained."""
    made = fresh_trainer(*args, **settings)
    made.train()
    return adapter_weights(made.model), made


def adapter_weights(model):
    """The weights of a model's adapters, one after the other."""
    return [p.detach() for n, p in model.named_parameters() if "psr_unit" in n]


# ---------------------------------------------------------------- psr train


PROMPTS = ["what is tea", "are dogs good", "what are dogs", "is tea good", "what is good"]
INSTRUCTIONS = {"brief": "be brief", "kind": "dogs are good"}
COMPLETIONS = ["tea is good", "a b c d e", "yes"]
STOPS_EARLY = {
    "traits": "kind",
    "epochs": 20,
    "learning_rate": 0.3,
    "gate": "constant",
    "eval_share": 0.2,
    "early_stopping": 2,
}


def rows(about, prompts=PROMPTS, completions=COMPLETIONS, **fields):
    return [
        {
            "trait": about,
            "prompt": [{"role": "user", "content": prompt}],
            "steered_prompt": add_instruction([{"role": "user", "content": prompt}], INSTRUCTIONS[about]),
            "completion": completion,
            "trait_score": 80.0,
            "model": "base",
            **fields,
        }
        for prompt in prompts
        for completion in completions
    ]


def write(path, *triplets):
    path.write_text("".join(json.dumps(row) + "\n" for row in triplets))
    return path


def make_files(folder):
    """A base model and 15 triplets for each of two traits."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write(folder / "triplets.jsonl", *rows("brief"), *rows("kind"))
    return folder


def make_recipe(made, **fields):
    settings = {
        "model": str(made / "base"),
        "triplets": str(made / "triplets.jsonl"),
        "triplets_model": "base",
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
    }
    return TrainRecipe(**{**settings, **fields})


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(first, second, traits=("brief", "kind"), atol=1e-6):
    for trait in traits:
        one, other = weights(first / trait), weights(second / trait)
        assert set(one) == set(other)
        for name, values in one.items():
            torch.testing.assert_close(values, other[name], atol=atol, rtol=0)


# ---------------------------------------------------------------- psr triplets


RESULTS = (TRIPLETS, REPORT, FIGURE, MANIFEST)
WORDS = "tea dogs rain bread ships music stone light paper water glass night".split()


def recipe(**options):
    return load_recipe(
        None, {"source": "personas", "model": "fake", "judge": "local", "judge_model": "fake", "draws": 4, **options}
    )


def pairs(count=5, negatives=False, trait="formal"):
    def pair(i, negative):
        user = {"role": "user", "content": f"what is {WORDS[i]}"}
        system = {"role": "system", "content": "be rude" if negative else "be formal"}
        name = f"{trait}/{'negative/' if negative else ''}{i}"
        return PromptPair(name, trait, [user], [system, user], negative)

    return [pair(i, negative) for negative in ([False, True] if negatives else [False]) for i in range(count)]


class FakeSampler:
    """Completions by the draw's seed, in an order that changes from call to call; can stop or fail."""

    def __init__(self, stop_after=None, failing=(), revision="r1"):
        self.stop_after, self.failing, self.revision = stop_after, set(failing), revision
        self.asked = []

    def describe(self):
        return {"engine": "fake", "model": "fake", "revision": self.revision, "template_hash": "t1"}

    def __call__(self, draws):
        draws = random.sample(list(draws), len(draws))
        for number, draw in enumerate(draws):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(draw.id)
            if draw.id in self.failing:
                yield draw, Failure("timeout after 3 tries")
            else:
                words = random.Random(draw.seed).choices(WORDS, k=12)
                yield (
                    draw,
                    Completion(" ".join(words), truncated=draw.seed % 7 == 0, prompt_tokens=9, completion_tokens=12),
                )


class FakeJudge(Judge):
    """Scores by the text; shown the bare prompt."""

    def __init__(self, failing=(), stop=False):
        self.failing, self.stop = failing, stop
        self.asked = 0

    def describe(self):
        return {"judge": "fake"}

    def score(self, prompts, completions, pairs=None):
        assert all([turn["role"] for turn in prompt] == ["user"] for prompt in prompts)
        self.asked += len(completions)
        self.usage["prompt_tokens"] += 100 * len(completions)
        self.usage["calls"] += len(completions)
        if self.stop:
            raise KeyboardInterrupt
        return [self.score_of(text) for text in completions]

    def score_of(self, text):
        if text.split()[0] in self.failing:
            return JudgeScores(None, None, "connection cut")
        return JudgeScores(sum(map(ord, text)) % 101, 100.0 - len(set(text.split())))


def start(folder, sampler=None, judge=None, negatives=False, plan=None, **options):
    return TripletRun(
        folder,
        recipe(negatives=negatives, **options),
        pairs(negatives=negatives) if plan is None else plan,
        lambda: sampler or FakeSampler(),
        lambda trait: judge or FakeJudge(),
    ).run()


def contents(folder, names=RESULTS):
    return {name: (folder / name).read_bytes() for name in names}


def lines(path):
    """The records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
