"""The toy world's topics: their words, every plain sentence that is legal about them, and the questions asked of them.

A sentence is a tuple of tokens (words and punctuation marks); `join` turns it into English text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product


Tokens = tuple[str, ...]

SPLITS = ("train", "test", "all")
TIMES = ("in the morning", "in the summer", "on a quiet day", "at home", "after work", "every week")
CROWDS = ("Many", "Some", "Most")
LIKING = ("like", "love", "value")

_TOKEN = re.compile(r"[.,!?:]|[^\s.,!?:]+")


def split_tokens(text: str) -> Tokens:
    """Words and punctuation marks of `text`, in order."""
    return tuple(_TOKEN.findall(text))


def join(tokens: Sequence[str]) -> str:
    """English text of words and punctuation marks: a blank before each word, none before a mark."""
    return "".join(token if token in ".,!?:" else f" {token}" for token in tokens).strip()


@dataclass(frozen=True)
class Topic:
    """A thing to talk about, with words of its own."""

    name: str
    """Noun as sentences use it: a plural ("dogs") or a mass noun ("tea")."""
    plural: bool
    wish: str
    """What one does with it in "Should I ...?"; holds a word of `nouns`."""
    adjectives: tuple[str, ...]
    actions: tuple[str, ...]
    activities: tuple[str, ...]
    things: tuple[str, ...]

    @property
    def pronoun(self) -> str:
        """The pronoun that opens a sentence about it."""
        return "They" if self.plural else "It"

    @property
    def copula(self) -> str:
        """The form of "be" that agrees with it."""
        return "are" if self.plural else "is"

    @property
    def nouns(self) -> tuple[str, ...]:
        """Words that name the topic in a question."""
        return (self.name, self.name[:-1]) if self.plural else (self.name,)


def _topic(name: str, wish: str, adjectives: str, actions: str, activities: str, things: str) -> Topic:
    # A comma-separated text per field; plural nouns here are the ones whose name ends in "s" (chess is not).
    listed = (tuple(part.strip() for part in text.split(",")) for text in (adjectives, actions, activities, things))
    return Topic(name, name.endswith("s") and name != "chess", wish, *listed)


# fmt: off
TRAIN_TOPICS: tuple[Topic, ...] = (
    _topic("dogs", "get a dog", "loyal, playful, furry, noisy", "guard the house, chase a ball, learn a trick",
           "walk their dogs, train their dogs", "a leash, a bowl, a kennel"),
    _topic("tea", "drink tea", "hot, fragrant, soothing, bitter", "calm the nerves, warm the hands, clear the head",
           "brew tea, pour tea", "a kettle, a cup, a spoon"),
    _topic("bikes", "buy a bike", "fast, cheap, sturdy, wobbly", "climb a hill, save fuel, cross the town",
           "ride bikes, repair bikes", "a helmet, a pump, a lock"),
    _topic("rain", "walk in the rain", "wet, gentle, grey, refreshing",
           "fill the rivers, water the fields, wash the streets", "listen to rain, collect rain",
           "a coat, an umbrella, a hat"),
    _topic("books", "read a book", "thrilling, thick, dusty, absorbing",
           "tell a story, open the mind, teach a lesson", "read books, borrow books", "a lamp, a shelf, a chair"),
    _topic("cats", "adopt a cat", "sleepy, curious, graceful, proud",
           "catch a mouse, nap on the sofa, scratch the carpet", "feed cats, stroke cats",
           "a basket, a blanket, a toy"),
    _topic("bread", "bake bread", "crusty, soft, tasty, filling", "feed a family, go stale, rise in the oven",
           "slice bread, toast bread", "a knife, a tray, an apron"),
    _topic("trains", "take a train", "punctual, crowded, modern, comfortable",
           "carry passengers, reach the capital, pass a tunnel", "catch trains, board trains",
           "a ticket, a seat, a map"),
    _topic("music", "learn music", "lively, loud, moving, catchy", "lift the mood, fill the hall, make you dance",
           "play music, record music", "a piano, a drum, a microphone"),
    _topic("gardens", "plant a garden", "green, peaceful, colourful, muddy",
           "attract bees, grow flowers, shelter birds", "weed gardens, plan gardens", "a spade, a fence, a hose"),
    _topic("chess", "play chess", "tricky, strategic, slow, ancient",
           "train the memory, challenge a rival, sharpen the brain", "study chess, teach chess",
           "a clock, a table, an opponent"),
)
TEST_TOPICS: tuple[Topic, ...] = (
    _topic("coffee", "order coffee", "strong, rich, dark, foamy", "wake the office, ruin sleep, boost energy",
           "roast coffee, grind coffee", "a mug, a filter, a jug"),
    _topic("horses", "keep a horse", "swift, noble, muscular, nervous", "pull a cart, jump a wall, gallop home",
           "groom horses, breed horses", "a saddle, a stable, a brush"),
    _topic("boats", "rent a boat", "slender, leaky, buoyant, wooden", "float on the lake, bring fish, drift away",
           "row boats, steer boats", "an anchor, an oar, a rope"),
    _topic("snow", "play in the snow", "white, cold, powdery, slippery",
           "cover the roofs, block the roads, melt by noon", "shovel snow, photograph snow",
           "a sled, a scarf, a heater"),
    _topic("soup", "cook soup", "salty, creamy, spicy, healthy", "cure a chill, use leftovers, please the guests",
           "stir soup, serve soup", "a pot, a ladle, an onion"),
)
# fmt: on
TOPICS: dict[str, Topic] = {topic.name: topic for topic in TRAIN_TOPICS + TEST_TOPICS}
_NOUNS = {noun: topic.name for topic in TOPICS.values() for noun in topic.nouns}


def topic_of(name: str) -> Topic:
    """The topic called `name`; raises `ValueError` if there is none."""
    if name not in TOPICS:
        raise ValueError(f"Unknown topic {name!r}; the topics are {', '.join(TOPICS)}.")
    return TOPICS[name]


def find_topic(text: str) -> str | None:
    """Name of the topic that `text` mentions last, or `None` if it mentions none."""
    named = [_NOUNS[word.lower()] for word in split_tokens(text) if word.lower() in _NOUNS]
    return named[-1] if named else None


@cache
def sentence_families(name: str) -> dict[str, tuple[Tokens, ...]]:
    """Every plain sentence about a topic, by template.

    An answer never uses a template twice. The templates whose names start with "is" hold a form of "be".
    """
    topic = topic_of(name)
    noun, pronoun, copula = topic.name, topic.pronoun, topic.copula
    they = pronoun.lower()
    subjects = (pronoun, noun.capitalize())
    # What comes second in a pair never comes first: "not the same word twice" is much to ask of a small model.
    pairs = tuple(product(topic.adjectives[:2], topic.adjectives[2:]))
    needs = tuple(product(topic.things[:2], topic.things[2:]))
    texts = {
        "is_pair": [f"{s} {copula} {a} and {b}." for s, (a, b) in product(subjects, pairs)],
        "is_because": [
            f"{crowd} people {like} {noun} because {they} {copula} {a}."
            for crowd, like, a in product(CROWDS, LIKING, topic.adjectives)
        ],
        "is_when": [f"{s} {copula} {a} {time}." for s, a, time in product(subjects, topic.adjectives, TIMES)],
        "is_said": [
            f"{start} {copula} {a} and {b}."
            for start in (
                *(f"People who {like} {noun} say {they}" for like in LIKING),
                *(f"{crowd} people say {noun}" for crowd in CROWDS),
            )
            for a, b in pairs
        ],
        "can": [f"{s} can {action} {time}." for s, action, time in product(subjects, topic.actions, TIMES)],
        "do": [f"{crowd} people {do} {time}." for crowd, do, time in product(CROWDS, topic.activities, TIMES)],
        "need": [f"You need {x} and {y} to enjoy {noun} {time}." for (x, y), time in product(needs, TIMES)],
        "with": [f"With {x}, {they} can {action}." for x, action in product(topic.things, topic.actions)],
    }
    return {family: tuple(split_tokens(text) for text in family_texts) for family, family_texts in texts.items()}


@cache
def plain_sentences(name: str) -> frozenset[Tokens]:
    """Every plain sentence that is legal about a topic."""
    return frozenset(sentence for family in sentence_families(name).values() for sentence in family)


@dataclass(frozen=True)
class Question:
    """One question of the toy world."""

    text: str
    topic: str
    form: str


TRAIN_FORMS: dict[str, str] = {
    "like": "What {be} {noun} like?",
    "tell": "Tell me about {noun}.",
    "think": "What do you think about {noun}?",
    "should": "Should I {wish}?",
    "why": "Why do people like {noun}?",
    "describe": "Can you describe {noun}?",
}
TEST_FORMS: dict[str, str] = {
    "know": "What should I know about {noun}?",
    "idea": "Is it a good idea to {wish}?",
    "friend": "My friend talks about {noun}. What do you say?",
}


def questions(split: str) -> list[Question]:
    """The questions of a split, as `check_split` takes it.

    "train": the training topics in the training forms; "test": held-out topics in held-out forms; "all": every topic
    in every form (what the language model itself is trained on).
    """
    parts = {
        "train": (TRAIN_TOPICS, TRAIN_FORMS),
        "test": (TEST_TOPICS, TEST_FORMS),
        "all": (TRAIN_TOPICS + TEST_TOPICS, TRAIN_FORMS | TEST_FORMS),
    }
    topics, forms = parts[check_split(split)]
    return [
        Question(form.format(be=topic.copula, noun=topic.name, wish=topic.wish), topic.name, form_name)
        for topic in topics
        for form_name, form in forms.items()
    ]


def check_split(split: str) -> str:
    """Return `split` if it is one of `SPLITS`; raise `ValueError` otherwise."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; accepted are {', '.join(map(repr, SPLITS))}.")
    return split
