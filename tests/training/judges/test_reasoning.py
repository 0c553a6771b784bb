"""Where reasoning ends and the answer begins."""

from __future__ import annotations

import pytest

from peft_psr.prompts.reasoning import Parts, opens_reasoning, split_reasoning
from peft_psr.training.judges.base import JudgeScores, judge_answers


HARMONY = "<|channel|>analysis<|message|>user asks tea<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("completion", "opened", "parts"),
    [
        (" tea is\ngood ", False, (None, " tea is\ngood ")),
        ("", False, (None, "")),
        ("<think>\nhm\n</think>\n\ntea", False, ("hm", "tea")),
        ("<think>\n\n</think>\n\ntea", False, ("", "tea")),
        ("\n<think>hm</think>tea", False, ("hm", "tea")),
        ("hm</think>tea", True, ("hm", "tea")),
        ("hm</think>tea", False, ("hm", "tea")),  # a server's answer, whose prompt nobody sees
        ("<think>hm", False, ("hm", None)),
        ("hm, let me", True, ("hm, let me", None)),
        ("<think>a</think>b<think>c</think>d", False, ("a</think>bc", "d")),
        ("<think>a</think>\n<think>c", False, ("a\nc", None)),
        ("write <think> to think", False, (None, "write <think> to think")),
        ("[THINK]hm[/THINK]tea", False, ("hm", "tea")),
        ("[THINK]hm", False, ("hm", None)),
        ("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>tea<|END_RESPONSE|>", False, ("hm", "tea")),
        (HARMONY + "<|channel|>final<|message|>tea is good", False, ("user asks tea", "tea is good")),
        (HARMONY + "<|channel|>final <|constrain|>json<|message|>{}<|return|>", False, ("user asks tea", "{}")),
        (HARMONY, False, ("user asks tea", None)),
        ("<|channel|>final<|message|>tea", False, (None, "tea")),
    ],
)
def test_parts(completion, opened, parts):
    assert split_reasoning(completion, opened) == Parts(*parts)


def test_prompts_that_open_it():
    assert opens_reasoning("<|im_start|>assistant\n<think>\n") and opens_reasoning("[INST]hi[/INST][THINK]")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n") and not opens_reasoning("")


def test_a_judge_is_asked_of_answers_alone():
    asked = []

    def judge(prompts, completions):
        asked.append((list(prompts), list(completions)))
        return [JudgeScores(float(len(text)), 1.0) for text in completions]

    scores = judge_answers(judge, ["a", "b", "c"], ["x", None, "yyy"])
    assert asked == [(["a", "c"], ["x", "yyy"])]
    assert scores == [JudgeScores(1.0, 1.0), JudgeScores(None, None), JudgeScores(3.0, 1.0)]
    assert judge_answers(judge, ["a"], [None]) == [JudgeScores(None, None)] and len(asked) == 1
