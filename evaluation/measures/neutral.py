"""What side effects are measured on: neutral prompts and texts, plainly unsafe requests, texts that drop the trait.

For real models they ship in `neutral_data/`, written for this package: tasks with one right answer, on which no trait
should show; plain prose; requests that any assistant is to refuse; and what a user may say to have the trait dropped.
The embedded model knows the words of its grammar alone: its neutral prompts are questions that ask to drop the act,
its texts plain answers outside a conversation, and unsafe requests it has none.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_psr.files import read_json
from peft_psr.prompts.conversations import Prompt, turn_texts
from peft_psr.prompts.messages import Message
from peft_psr.tiny_chat import prompt_messages, questions, sample_answer
from peft_psr.tiny_chat.traits import DROP_REQUESTS
from peft_psr.training import PromptPair, Triplet, add_instruction
from peft_psr.training.data.placement import Placement

from .side_effects import text_triplets


@dataclass(frozen=True)
class NeutralData:
    """What to measure on.

    Attributes:
        prompts: Conversations on which the trait should not show.
        texts: Plain texts, no answers to anything.
        unsafe: Conversations whose request is to be refused; may be empty.
        injections: What a user adds to a question to have the trait dropped.
        text_start: What plain texts begin with, before any instruction.
        separator: Between a question and an injection, an instruction and a text.
    """

    prompts: list[list[Message]]
    texts: list[str]
    unsafe: list[list[Message]]
    injections: list[str]
    text_start: str = ""
    separator: str = "\n\n"


def shipped_data() -> NeutralData:
    """What ships with the package."""

    def read(name: str) -> list[str]:
        return read_json(Path(__file__).parent / "neutral_data" / f"{name}.json")

    return NeutralData(
        prompts=[prompt_messages(text) for text in read("prompts")],
        texts=read("texts"),
        unsafe=[prompt_messages(text) for text in read("unsafe_requests")],
        injections=read("injections"),
    )


def embedded_data(text_start: str) -> NeutralData:
    """What the embedded model's grammar has: held-out topics, forms and plain answers, begun with `text_start`."""
    rng = random.Random(0)
    asked = questions("test")
    return NeutralData(
        prompts=[prompt_messages(f"{question.text} {request}") for question in asked for request in DROP_REQUESTS],
        texts=[sample_answer(rng, question.topic) for question in asked for _ in range(2)],
        unsafe=[],
        injections=list(DROP_REQUESTS),
        text_start=f"{text_start} ",
        separator=" ",
    )


def text_rows(data: NeutralData, instructions: Sequence[str]) -> list[Triplet]:
    """The texts as triplets: the first half is context for the rest; each has one of the instructions in turn."""
    rows = []
    for index, row in enumerate(text_triplets(data.texts)):
        context = data.text_start + str(row["prompt"])
        instruction = instructions[index % len(instructions)]
        steered = data.text_start + instruction + data.separator + str(row["prompt"])
        rows.append(Triplet(prompt=context, steered_prompt=steered, completion=row["completion"]))
    return rows


def instruction_of(pair: PromptPair, placement: Placement) -> str:
    """The instruction that makes a pair's steered prompt of its prompt; `ValueError` if none at that place does."""
    mark = "\x00"
    marked: Prompt = add_instruction(pair.prompt, mark, placement)
    for place, turn in zip(turn_texts(marked), turn_texts(pair.steered_prompt), strict=False):
        before, found, after = place.partition(mark)
        if found:
            instruction = turn[len(before) : len(turn) - len(after)]
            if add_instruction(pair.prompt, instruction, placement) == pair.steered_prompt:
                return instruction
    raise ValueError(f"{pair.id}: its steered prompt is not its prompt with an instruction (placement: {placement}).")


def instructions_of(pairs: Sequence[PromptPair], placement: Placement) -> list[str]:
    """The different instructions of a trait's pairs, in order."""
    return list(dict.fromkeys(instruction_of(pair, placement) for pair in pairs))


def instructed(prompts: Sequence[Prompt], instructions: Sequence[str], placement: Placement) -> list[Prompt]:
    """Each prompt with one of the instructions, in turn."""
    # shifted each round, or a period that they share would tie one kind of prompt to one instruction
    count = len(instructions)
    return [add_instruction(p, instructions[(i + i // count) % count], placement) for i, p in enumerate(prompts)]
