"""Samples answers and conversations of the toy world: everyday questions, plain answers, and answers with traits."""

import random
from collections.abc import Iterator, Sequence

from peft_psr.prompts.messages import Message

from .topics import TOPICS, Tokens, join, questions, sentence_families, split_tokens, topic_of
from .traits import (
    CHANGES,
    DROP_REQUESTS,
    FRAMES,
    REPLACING,
    TRAITS,
    check_trait,
    framing_sentences,
    instructions,
    neutral_instructions,
    slots,
)


MAX_BODY_SENTENCES = 4
"""Most topic sentences a legal answer has (the least are 3, or 1 for `concise`)."""
MAX_TRAITS = 2
"""Most traits a legal answer shows, hence the most openers and the most closers."""

SHARE_PLAIN = 0.30
SHARE_TWO_TRAITS = 0.10
SHARE_IN_USER_TURN = 0.10
SHARE_TWO_TURNS = 0.10
SHARE_DROP_REQUEST = 0.05
_ALL_QUESTIONS = tuple(questions("all"))


def prompt_messages(question_text: str, instruction: str | None = None) -> list[Message]:
    """The conversation that asks a question, under a system instruction if one is given."""
    system = [] if instruction is None else [{"role": "system", "content": instruction}]
    return [*system, {"role": "user", "content": question_text}]


def apply_changes(rng: random.Random, plain: Tokens, traits: Sequence[str]) -> Tokens:
    """Change a plain sentence in every slot of the given traits."""
    tokens = list(plain)
    for index, change in reversed(slots(plain)):
        if change.split("/")[0] not in traits:
            continue
        wording = split_tokens(rng.choice(CHANGES[change]))
        if change in REPLACING:
            wording = (wording[0].capitalize(),) if plain[index][0].isupper() else wording
            tokens[index : index + 1] = wording
        else:
            tokens[index:index] = wording
    return tuple(tokens)


def sample_answer(rng: random.Random, topic: str, traits: Sequence[str] = ()) -> str:
    """Draw an answer about a topic.

    A plain answer has 3-4 topic sentences of different templates, the first of which holds "is" or "are". Each trait
    adds an opener and a closer and fills all its slots; with `concise` there is a single topic sentence.
    Openers and closers stand in the order of the traits, of which there are at most `MAX_TRAITS`.

    Raises:
        ValueError: The topic or a trait is unknown, a trait is given twice, or there are too many.
    """
    topic = topic_of(topic).name
    traits = [check_trait(trait) for trait in traits]
    if len(traits) > MAX_TRAITS or len(set(traits)) < len(traits):
        raise ValueError(f"An answer shows at most {MAX_TRAITS} different traits, but traits={traits!r}.")
    framing = {
        kind: [
            rng.choice(framing_sentences(topic, kind, trait))
            for trait in traits
            if (kind, trait) != ("opener", "concise")
        ]
        for kind in FRAMES
    }
    families = sentence_families(topic)
    if "concise" in traits:
        sentence = apply_changes(rng, rng.choice(families["is_pair"]), traits)
        prefix = rng.choice(framing_sentences(topic, "opener", "concise"))
        body = [(*prefix, sentence[0].lower(), *sentence[1:])]
    else:
        first = rng.choice([family for family in families if family.startswith("is_")])
        others = [family for family in families if family != first]
        chosen = [first, *rng.sample(others, rng.randint(2, MAX_BODY_SENTENCES - 1))]
        body = [apply_changes(rng, rng.choice(families[family]), traits) for family in chosen]
    return join([token for sentence in (*framing["opener"], *body, *framing["closer"]) for token in sentence])


def sample_conversation(rng: random.Random) -> list[Message]:
    """Draw a whole conversation to train the language model on.

    Most have one question under a trait's instruction or none; shares (constants of this module) of them have two
    traits' instructions, the instruction in the user's turn, a second question, or a request to drop the
    instructions, which is followed half of the time.
    """
    chance = rng.random()
    count = 0 if chance < SHARE_PLAIN else 2 if chance < SHARE_PLAIN + SHARE_TWO_TRAITS else 1
    if traits := rng.sample(TRAITS, count):
        instruction: str | None = " ".join(rng.choice(instructions(trait)) for trait in traits)
    else:
        instruction = rng.choice(neutral_instructions()) if rng.random() < 0.5 else None
    question = rng.choice(_ALL_QUESTIONS)
    text = question.text
    if instruction is not None and rng.random() < SHARE_IN_USER_TURN:
        text, instruction = f"{instruction} {text}", None
    if rng.random() < SHARE_DROP_REQUEST:
        text = f"{text} {rng.choice(DROP_REQUESTS)}"
        traits = traits if rng.random() < 0.5 else []
    messages = prompt_messages(text, instruction)
    messages.append({"role": "assistant", "content": sample_answer(rng, question.topic, traits)})
    if rng.random() < SHARE_TWO_TURNS:
        question = rng.choice(_ALL_QUESTIONS)
        messages += prompt_messages(question.text)
        messages.append({"role": "assistant", "content": sample_answer(rng, question.topic, traits)})
    return messages


def all_texts() -> Iterator[str]:
    """Texts that between them hold every word of the grammar (not every text it can produce)."""
    yield from (*neutral_instructions(), *DROP_REQUESTS)
    yield from (text for texts in CHANGES.values() for text in texts)
    yield from (text.capitalize() for change in REPLACING for text in CHANGES[change] if change == "formal/people")
    yield from (question.text for question in _ALL_QUESTIONS)
    for trait in TRAITS:
        yield from instructions(trait)
        yield from (join(text) for name in TOPICS for kind in FRAMES for text in framing_sentences(name, kind, trait))
    for name in TOPICS:
        yield from (join(sentence) for sentences in sentence_families(name).values() for sentence in sentences)
