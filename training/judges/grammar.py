"""Judges completions of the toy world by its own grammar, exactly and quickly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from peft_psr.prompts.conversations import Prompt, turn_texts
from peft_psr.tiny_chat.grammar import MAX_BODY_SENTENCES, MAX_TRAITS
from peft_psr.tiny_chat.topics import TOPICS, Tokens, find_topic, plain_sentences, split_tokens, topic_of
from peft_psr.tiny_chat.traits import changes_fit, check_trait, concise_prefix, framing_index, slots, strip_changes
from peft_psr.training.data.draws import PromptPair

from .base import Judge, JudgeScores
from .settings import JudgeSettings


FAILURES = ("broken", "wrong_topic", "repeated", "misplaced", "too_long", "unfinished", "no_answer")
"""What a sentence can get wrong; `GrammarJudge.explain` says what each means."""


@dataclass(frozen=True)
class _Sentence:
    # One sentence, read against the grammar of one topic. kind: "opener", "closer" or "body" (anything else).
    tokens: Tokens
    kind: str
    trait: str | None = None
    """Whose opener or closer it is."""
    plain: Tokens = ()
    """Body: the sentence without its changes and without the prefix of `concise`."""
    changes: tuple[tuple[int, str], ...] = ()
    has_prefix: bool = False
    legal: bool = True
    elsewhere: bool = False
    """Whether it is legal for another topic."""
    finished: bool = True


def _split_sentences(tokens: Tokens) -> list[Tokens]:
    sentences: list[Tokens] = []
    start = 0
    for i, token in enumerate(tokens):
        if token in ".!?":
            sentences.append(tokens[start : i + 1])
            start = i + 1
    if start < len(tokens):
        sentences.append(tokens[start:])
    return sentences


def _read_body(tokens: Tokens, topic: str) -> tuple[Tokens, tuple[tuple[int, str], ...], bool, bool]:
    # -> plain sentence, its changes, whether it has the prefix of `concise`, whether it is legal.
    prefix = concise_prefix(tokens)
    rest = tokens[prefix:]
    lower_start = bool(rest) and rest[0][0].islower()
    if prefix and lower_start:
        rest = (rest[0].capitalize(), *rest[1:])
    plain, changes = strip_changes(rest, topic_of(topic).copula)
    legal = plain in plain_sentences(topic) and changes_fit(plain, changes) and (not prefix or lower_start)
    return plain, changes, prefix > 0, legal


@lru_cache(maxsize=65536)
def _legal_elsewhere(tokens: Tokens, topic: str) -> bool:
    others = [name for name in TOPICS if name != topic]
    return any(tokens in framing_index(name) or _read_body(tokens, name)[-1] for name in others)


def _read(tokens: Tokens, topic: str) -> _Sentence:
    if tokens in framing_index(topic):
        kind, trait = framing_index(topic)[tokens]
        return _Sentence(tokens, kind, trait)
    plain, changes, has_prefix, legal = _read_body(tokens, topic)
    finished = tokens[-1] in ".!?"
    elsewhere = finished and not legal and _legal_elsewhere(tokens, topic)
    return _Sentence(tokens, "body", None, plain, changes, has_prefix, legal, elsewhere, finished)


def _failures(sentences: Sequence[_Sentence]) -> list[str | None]:
    # The first thing each sentence gets wrong, or None.
    seen: set[Tokens] = set()
    framed: set[tuple[str, str | None]] = set()
    counts = {"opener": 0, "closer": 0, "body": 0}
    limits = {"opener": MAX_TRAITS, "closer": MAX_TRAITS, "body": MAX_BODY_SENTENCES}
    failures: list[str | None] = []
    for sentence in sentences:
        identity = sentence.plain if sentence.kind == "body" else sentence.tokens
        out_of_place = (
            (sentence.kind == "opener" and counts["body"] + counts["closer"] > 0)
            or (sentence.kind == "body" and (counts["closer"] > 0 or (sentence.has_prefix and counts["body"] > 0)))
            or (sentence.kind == "closer" and counts["body"] == 0)
            or (sentence.kind != "body" and (sentence.kind, sentence.trait) in framed)
        )
        if not sentence.finished:
            failure = "unfinished"
        elif sentence.elsewhere:
            failure = "wrong_topic"
        elif not sentence.legal:
            failure = "broken"
        elif identity in seen:
            failure = "repeated"
        elif out_of_place:
            failure = "misplaced"
        elif counts[sentence.kind] >= limits[sentence.kind]:
            failure = "too_long"
        else:
            failure = None
        failures.append(failure)
        seen.add(identity)
        framed.add((sentence.kind, sentence.trait))
        if failure != "misplaced":
            counts[sentence.kind] += 1
    return failures


def _inside_share(body: Sequence[_Sentence], trait: str) -> float:
    # Share of the trait's slots in these sentences that are filled; needs no sentence to be legal.
    expected = filled = 0
    for sentence in body:
        own = [slot for slot in slots(sentence.plain) if slot[1].startswith(trait + "/")]
        expected += len(own)
        filled += len(set(own) & set(sentence.changes))
    return filled / expected if expected else 0.0


def _marker_shares(sentences: Sequence[_Sentence], trait: str) -> dict[str, float]:
    # How fully each of the trait's three marker kinds is there, 0-1.
    body = [sentence for sentence in sentences if sentence.kind == "body"]
    start = next((i for i, sentence in enumerate(sentences) if sentence.kind == "body"), len(sentences))
    closer = any(sentence.kind == "closer" and sentence.trait == trait for sentence in sentences[start:])
    if trait == "concise":
        brevity = {1: 1.0, 2: 0.5}.get(len(body), 0.0)
        return {"opener": float(bool(body) and body[0].has_prefix), "inside": brevity, "closer": float(closer)}
    opener = any(sentence.kind == "opener" and sentence.trait == trait for sentence in sentences[:start])
    return {"opener": float(opener), "inside": _inside_share(body, trait), "closer": float(closer)}


class GrammarJudge(Judge):
    """Scores a trait and coherence of completions by the toy world's grammar.

    Trait score: mean of three shares, times 100. The trait's opener is there before the first topic sentence (0 or 1);
    its changes are there in its slots (the share of the slots filled); its closer is there after the first topic
    sentence (0 or 1). For `concise`: it starts with "In short:" or the like; it has one topic sentence (two count
    half); its closer. Coherence score: the share of sentences in which nothing is wrong, times 100. Any trait's
    markers are coherent where they belong. An empty completion scores 0 and 0.
    """

    def __init__(self, trait: str) -> None:
        """A judge of one of `TRAITS`; any other name is a `ValueError`."""
        self.trait = check_trait(trait)

    @classmethod
    def maker(cls, given: JudgeSettings) -> Callable[[str], Judge]:
        """See `Judge.maker`."""
        return cls

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], pairs: Sequence[PromptPair] | None = None
    ) -> list[JudgeScores]:
        """See `Judge.score`; raises `ValueError` if a prompt names no topic of the toy world."""
        details = [self.explain(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        return [JudgeScores(detail["trait_score"], detail["coherence_score"]) for detail in details]

    def explain(self, prompt: Prompt, completion: str) -> dict[str, Any]:
        """Both scores of one completion and what they come from; the bare prompt's last user turn names the topic.

        Returns:
            `trait_score` and `coherence_score`; `topic`; `markers`, the three shares behind the trait score;
            `sentences`, their number; `failures`, a count for each of `FAILURES`; `wrong`, pairs of a wrong sentence
            and its failure. The failures: `wrong_topic`, legal about another topic; `broken`, not of the grammar at
            all; `repeated`, said before; `misplaced`, in the wrong part of the answer, or a second opener or closer of
            one trait; `too_long`, more sentences than any legal answer has; `unfinished`, without an end; `no_answer`,
            the completion has no legal sentence about the topic (counts as one more wrong sentence).
        """
        topic = _topic_asked(prompt)
        sentences = [_read(tokens, topic) for tokens in _split_sentences(split_tokens(completion))]
        failures = _failures(sentences)
        counts = dict.fromkeys(FAILURES, 0)
        for failure in failures:
            if failure:
                counts[failure] += 1
        total = len(sentences)
        if not any(sentence.kind == "body" and sentence.legal for sentence in sentences):
            counts["no_answer"] = 1
            total += 1
        markers = _marker_shares(sentences, self.trait)
        return {
            "trait_score": 100.0 * sum(markers.values()) / len(markers),
            "coherence_score": 100.0 * (total - sum(counts.values())) / total,
            "topic": topic,
            "markers": markers,
            "sentences": len(sentences),
            "failures": counts,
            "wrong": [
                (" ".join(sentence.tokens), failure)
                for sentence, failure in zip(sentences, failures, strict=True)
                if failure
            ],
        }


def _topic_asked(prompt: Prompt) -> str:
    text = next(reversed(turn_texts(prompt, "user")), "")
    topic = find_topic(text)
    if topic is None:
        raise ValueError(f"The last user message {text!r} names no topic; name one of {', '.join(TOPICS)}.")
    return topic
