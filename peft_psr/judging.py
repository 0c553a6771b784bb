"""What a judge is: anything that scores completions for a trait and for coherence, both 0-100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


Message = dict[str, Any]
"""One turn of a conversation in the chat format: `{"role": "system" | "user" | "assistant", "content": str}`.

The content may also be a list of parts, as multimodal templates take it: `[{"type": "text", "text": str}]`.
"""


def content_text(message: Message) -> str:
    """The text of a turn, whether it is given as such or in parts.

    Raises:
        ValueError: there is no content, or something in it is no text.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ValueError(
        f"The content of a {message.get('role')!r} turn must be text, or a list of parts such as "
        f'{{"type": "text", "text": "..."}}; got {content!r:.200}.'
    )


class JudgeScores(NamedTuple):
    """The two scores of one completion, each 0-100, or `None` where the judge could not tell.

    Attributes:
        trait: How strongly the completion shows the trait.
        coherence: How coherent it is as an answer to the prompt.
        failure: Why the judge gave no answer at all, e.g. a server that failed after all retries; both scores are
            `None` then, and judging the completion again may help. `None` where the judge answered.
    """

    trait: float | None
    coherence: float | None
    failure: str | None = None


class Judge(Protocol):
    """Scores completions in batches.

    A judge is shown the *bare* prompt x (without the instruction that elicits the trait), so that the prompted and the
    steered model are judged alike. A judge may have `describe() -> dict`, which says as JSON what it is and how it
    scores, for the manifest of a run.
    """

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[JudgeScores]:
        """Score `completions[i]` as an answer to `prompts[i]`; one `JudgeScores` per completion, in order."""
        ...


def judge_answers(judge: Judge, prompts: Sequence[Any], answers: Sequence[str | None]) -> list[JudgeScores]:
    """A judge's scores of answers; it is not asked about those that are not there, which get none.

    Args:
        judge: Who scores.
        prompts: What each is an answer to.
        answers: `None` where a model did not come to answer: its reasoning was cut off.
    """
    there = [i for i, answer in enumerate(answers) if answer is not None]
    scores = [JudgeScores(None, None)] * len(answers)
    if there:
        found = judge([prompts[i] for i in there], [answers[i] for i in there])  # type: ignore[misc]
        for i, score in zip(there, found, strict=True):
            scores[i] = score
    return scores
