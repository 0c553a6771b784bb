"""The answer in what a model wrote, without the reasoning that some models put before it.

Known are tags, as Qwen3, DeepSeek-R1, Magistral or Command A write them, and the channels of gpt-oss. Many templates
open the reasoning in the prompt, so that a completion shows its end alone.
"""

import re
from typing import NamedTuple


TAGS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)(?:(?!<\|(?:channel|message|start|end)\|>).)*<\|message\|>", re.DOTALL)
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start)\|>")
_FRAMES = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")


class Parts(NamedTuple):
    """What a model wrote, in two.

    Attributes:
        reasoning: What it thought before it answered; `None` where it did not.
        answer: The rest, without blanks around it where there was reasoning; `None` where the reasoning did not end.
    """

    reasoning: str | None
    answer: str | None


def split_reasoning(completion: str, opened: bool = False) -> Parts:
    """Part a completion into reasoning and answer; one without reasoning is all answer, letter by letter.

    Args:
        completion: What the model wrote, special tokens included.
        opened: The prompt has opened the reasoning already (`opens_reasoning`).
    """
    if "<|channel|>" in completion:
        return _by_channel(completion)
    start = completion.lstrip()
    for opening, closing in TAGS:
        if closing in completion and (opened or start.startswith(opening) or opening not in completion):
            before, _, after = completion.rpartition(closing)
            reasoning = before.replace(opening, "").strip()
            if after.lstrip().startswith(opening):  # a second thought, without an end
                return Parts(f"{reasoning}\n{after.lstrip().removeprefix(opening)}".strip(), None)
            for frame in _FRAMES:
                after = after.replace(frame, "")
            return Parts(reasoning, after.strip())
        if start.startswith(opening):
            return Parts(start.removeprefix(opening).strip(), None)
    return Parts(completion.strip(), None) if opened else Parts(None, completion)


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends inside reasoning that the completion goes on with."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in TAGS))


def _by_channel(completion: str) -> Parts:
    """gpt-oss: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>..."""
    reasoning, answer = [], None
    for part in _CHANNEL.finditer(completion):
        end = _CHANNEL_END.search(completion, part.end())
        text = completion[part.end() : end.start() if end else len(completion)].strip()
        if part[1] == "final":
            answer = text
        else:
            reasoning.append(text)
    return Parts("\n".join(reasoning) or None, answer)
