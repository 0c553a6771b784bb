"""A trait of the embedded model as data: triplets to train on and held out, and the prompted model's score.

For the studies and benchmarks of this repository. Training sees the training instructions, topics and question forms;
what is held out has others.
"""

import random

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_psr.evaluation.measures.scoring import SteeringScore, score_model
from peft_psr.tiny_chat import instructions, prompt_messages, questions
from peft_psr.training import Triplet, add_instruction, filter_triplets, generate_triplets
from peft_psr.training.judges.grammar import GrammarJudge


MAX_NEW_TOKENS = 96


class ToyTask:
    """What to steer towards, with data and judge.

    `train_prompts` prompts drawn from the training split have `train_draws` completions for each instruction, each
    pair of held-out instruction and question `held_out_draws`. Same seed, same machine: same data.

    Attributes:
        name: The trait.
        judge: Scores answers for it.
        processing_class: The tokenizer.
        train_instructions, test_instructions: System texts that elicit the trait, and others, held out.
        train_prompts, test_prompts: Bare conversations, and others, held out.
        triplets: To train on.
        held_out: To measure on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        name: str,
        train_prompts: int = 20,
        train_draws: int = 2,
        held_out_draws: int = 2,
        seed: int = 0,
    ) -> None:
        self.model, self.processing_class, self.name, self.seed = model, processing_class, name, seed
        self.judge = GrammarJudge(name)
        self.train_instructions, self.test_instructions = (instructions(name, split) for split in ("train", "test"))
        self.train_prompts, self.test_prompts = (
            [prompt_messages(question.text) for question in questions(split)] for split in ("train", "test")
        )
        prompts = random.Random(seed).sample(self.train_prompts, min(train_prompts, len(self.train_prompts)))
        self.triplets = filter_triplets(self._draw(self.train_instructions, prompts, train_draws, seed))
        drawn = self._draw(self.test_instructions, self.test_prompts, held_out_draws, seed + 1)
        self.held_out = [triplet for triplet in drawn if triplet["completion"]]

    def _draw(self, texts: list[str], prompts: list, draws: int, seed: int) -> list[Triplet]:
        return generate_triplets(
            self.model, self.processing_class, texts, prompts, self.judge, num_draws=draws,
            max_new_tokens=MAX_NEW_TOKENS, batch_size=256, seed=seed, progress=False,
        )  # fmt: skip

    def prompted(self, draws: int) -> SteeringScore:
        """The prompted model's score, over so many answers to each held-out question and instruction."""
        pairs = [(add_instruction(p, i), p) for i in self.test_instructions for p in self.test_prompts]
        (score,) = score_model(
            self.model, self.processing_class, [steered for steered, _ in pairs], self.judge, MAX_NEW_TOKENS,
            bare_prompts=[bare for _, bare in pairs], num_draws=draws, seed=self.seed + 2,
        )  # fmt: skip
        return score
