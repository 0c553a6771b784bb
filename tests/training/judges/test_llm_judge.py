"""Judges on servers: scores, prompts, mishaps, the cache. Also what a judge is asked."""

from __future__ import annotations

import json

import pytest
from helpers.unruly_server import MODEL, UnrulyServer, at_random

from peft_psr.prompts.conversations import prompt_text
from peft_psr.training.judges.answer_cache import AnswerCache
from peft_psr.training.judges.base import JudgeScores
from peft_psr.training.judges.prompts import fill_prompt
from peft_psr.training.judges.server import ServerJudge
from peft_psr.training.sampling.chat_server import ChatServer, ServerError


pytestmark = pytest.mark.usefixtures("no_key")


TRAIT, COHERENCE = "trait {question} | {answer}", "coherence {question} | {answer}"
QUESTION = [{"role": "user", "content": "what is tea"}]


# ---------------------------------------------------------------- prompts


def test_prompts_are_filled_once():
    assert fill_prompt("{question} {answer} {other} {}", question="{answer}", answer="b") == "{answer} b {other} {}"
    assert prompt_text("once") == "once" and prompt_text(QUESTION) == "what is tea"
    turns = [*QUESTION, {"role": "assistant", "content": "a drink"}, {"role": "user", "content": "hot?"}]
    assert prompt_text(turns) == "user: what is tea\n\nassistant: a drink\n\nuser: hot?"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trait_prompt": "rate it"}, "trait_prompt must hold {answer}"),
        ({"coherence_prompt": "rate it"}, "coherence_prompt must hold {answer}"),
        ({"trait_prompt": "{trait} {answer}"}, "give `trait`"),
    ],
)
def test_bad_prompts(settings, message):
    with pytest.raises(ValueError, match=message):
        ServerJudge(ChatServer("http://host/v1", MODEL), **settings)


# ---------------------------------------------------------------- the judge by server


def grade(body):
    """Numbers as whole tokens: the trait by the answer's last word, coherence always near 95."""
    kind, *_, last = body["messages"][0]["content"].split()
    score = 95 if kind == "coherence" else int(last)
    return str(score), [(str(score), {str(score): 0.6, str(score - 10): 0.3, "The": 0.1})]


def judge_of(server, cache=None, **settings):
    settings = {"model": MODEL, "concurrency": 8, "timeout": 0.3, "backoff": 0.01, **settings}
    return ServerJudge(ChatServer(server.url, **settings), trait_prompt=TRAIT, coherence_prompt=COHERENCE, cache=cache)


def completions(*scores):
    return [f"the answer {score}" for score in scores]


def mean(score):
    return pytest.approx(score - 10 / 3)


def test_scores_from_a_server():
    with UnrulyServer(reply=grade) as server:
        judge = judge_of(server)
        scores = judge([QUESTION] * 3, completions(90, 20, 90))
    assert [score.trait for score in scores] == [mean(90), mean(20), mean(90)]
    assert all(score.coherence == mean(95) and score.failure is None for score in scores)
    assert len(server.bodies) == 4 == judge.usage["calls"]  # equal completions are asked about once
    body = server.bodies[0]
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 20)
    described = judge.describe()
    assert described["score"] == "log-probabilities" and described["trait_prompt"] == TRAIT
    assert json.loads(json.dumps(described)) == described
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        judge([QUESTION], ["a", "b"])


def test_mishaps_do_not_change_scores():
    with UnrulyServer(reply=grade) as server:
        expected = judge_of(server)([QUESTION] * 20, completions(*range(10, 30)))
    with UnrulyServer(at_random(seed=2), reply=grade, stall=0.4) as server:
        judge = judge_of(server, concurrency=16)
        assert judge([QUESTION] * 20, completions(*range(10, 30))) == expected
    assert judge.server.counts["retried"] > 10


def test_no_logprobs_falls_back_to_text_and_says_so(caplog):
    with UnrulyServer(reply=lambda body: grade(body)[0]) as server:
        judge = judge_of(server)
        assert judge([QUESTION] * 2, completions(90, 20)) == [JudgeScores(90, 95), JudgeScores(20, 95)]
    assert judge.describe()["score"] == "text" and judge.server.counts["no_logprobs"] == 4
    assert caplog.text.count("gives no log-probabilities") == 1


def test_server_that_refuses_logprobs():
    def behave(body, attempt):
        return "400 logprobs are not supported" if body.get("logprobs") else "ok"

    with UnrulyServer(behave, reply=lambda body: grade(body)[0]) as server:
        judge = judge_of(server, concurrency=1)
        assert judge([QUESTION], completions(90)) == [JudgeScores(90, 95)]
    assert ["logprobs" in body for body in server.bodies] == [True, False, False]


@pytest.mark.parametrize(
    "words",
    [
        "top_logprobs must be between 0 and 5",
        "Requested sample logprobs of 20, which is greater than max allowed: 5",
        "Invalid value for 'top_logprobs': must be less",
    ],
)
def test_server_that_gives_five_logprobs(words, caplog):
    def behave(body, attempt):
        return f"400 {words}" if body.get("top_logprobs", 0) > 5 else "ok"

    with UnrulyServer(behave, reply=grade) as server:
        judge = judge_of(server, concurrency=1)
        assert judge([QUESTION] * 2, completions(90, 20))[0].trait == mean(90)
    assert [body["top_logprobs"] for body in server.bodies] == [20, 5, 5, 5, 5][: len(server.bodies)]
    assert judge.describe()["top_logprobs"] == 5 and judge.describe()["score"] == "log-probabilities"
    assert caplog.text.count("at most 5 of the likeliest tokens, not 20") == 1


def thinking(content, reasoning, tokens, finish_reason="stop"):
    places = [{"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": -0.1}]} for t in tokens]
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return json.dumps(
        {
            "model": MODEL,
            "choices": [
                {"index": 0, "finish_reason": finish_reason, "message": message, "logprobs": {"content": places}}
            ],
        }
    ).encode()


def test_judge_whose_reasoning_is_kept_apart(caplog):
    body = thinking("85", "10 things", ["10", " things", "</think>", "85"])
    with UnrulyServer(lambda request, attempt: body) as server:
        judge = judge_of(server)
        assert judge([QUESTION], completions(90))[0].trait == pytest.approx(85)
    assert judge.describe()["score"] == "log-probabilities"
    cut = thinking(None, "10 things", ["10", " things"], finish_reason="length")
    with UnrulyServer(lambda request, attempt: cut) as server:
        assert judge_of(server)([QUESTION], completions(90)) == [JudgeScores(None, None)]
    assert caplog.text.count("Switch its reasoning off by judge_fields") == 1


def test_half_a_character_in_a_judges_answer_is_kept(tmp_path):
    body = thinking("85", None, ["85"]).replace(
        b'"token": "85", "logprob": -0.1', b'"token": "\\ud83d", "logprob": -9.0'
    )
    with UnrulyServer(lambda request, attempt: body) as server:
        first = judge_of(server, AnswerCache(tmp_path / "answers"))([QUESTION], completions(90))
        assert judge_of(server, AnswerCache(tmp_path / "answers"))([QUESTION], completions(90)) == first
        assert len(server.bodies) == 2


def test_server_that_splits_numbers(caplog):
    def digits(body):
        text = grade(body)[0]
        return text, [(digit, {digit: 0.7, "1": 0.2, "x": 0.1}) for digit in text]

    with UnrulyServer(reply=digits) as server:
        judge = judge_of(server)
        assert judge([QUESTION], completions(85)) == [JudgeScores(85, 95)]
    assert judge.describe()["score"] == "text" and "split numbers" in caplog.text


def test_mixed_sources_are_counted():
    def some(body):
        text, tokens = grade(body)
        return (text, tokens) if body["messages"][0]["content"].startswith("trait") else text

    with UnrulyServer(reply=some) as server:
        judge = judge_of(server)
        judge([QUESTION], completions(85))
    assert judge.describe()["score"] == {"log-probabilities": 1, "text": 1}


def test_failures_are_named_and_asked_again(tmp_path):
    broken = [True]

    def behave(body, attempt):
        return (
            "500"
            if broken[0] and body["messages"][0]["content"].endswith("trait what is tea | the answer 20")
            else "ok"
        )

    with UnrulyServer(behave, reply=grade) as server:
        judge = judge_of(server, AnswerCache(tmp_path / "answers"), max_retries=1)
        good, bad = judge([QUESTION] * 2, completions(90, 20))
        assert good.trait == mean(90) and good.failure is None
        assert (bad.trait, bad.coherence) == (None, None) and "trait: " in bad.failure and "500" in bad.failure
        broken[0] = False
        server.bodies.clear()
        assert judge([QUESTION] * 2, completions(90, 20))[1].trait == mean(20)
        assert len(server.bodies) == 1  # the coherence answer was kept


def test_could_not_tell_is_no_failure():
    def unsure(body):
        return "no", [("no", {"no": 0.9, "50": 0.1})]

    with UnrulyServer(reply=unsure) as server:
        assert judge_of(server)([QUESTION], completions(90)) == [JudgeScores(None, None, None)]


# ---------------------------------------------------------------- the cache


def test_a_rerun_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-Very+Secret")
    path = tmp_path / "made" / "answers.sqlite"
    with UnrulyServer(reply=grade) as server:
        first = judge_of(server, AnswerCache(path))([QUESTION] * 10, completions(*range(10, 20)))
        assert len(server.bodies) == 20
        again = judge_of(server, AnswerCache(path))
        assert again([QUESTION] * 10, completions(*range(10, 20))) == first
        assert len(server.bodies) == 20 and again.usage == {"cached": 20}
        assert again.describe()["score"] == "log-probabilities"
        again([QUESTION], completions(20))
        assert len(server.bodies) == 22
        other = judge_of(server, AnswerCache(path), extra_body={"top_k": -1})
        other([QUESTION], completions(11))
        assert len(server.bodies) == 24 and server.bodies[-1]["top_k"] == -1
    assert b"Secret" not in path.read_bytes()


def test_a_stopped_run_keeps_its_answers(tmp_path):
    with UnrulyServer(lambda body, attempt: "401" if len(server.bodies) > 7 else "ok", reply=grade) as server:
        judge = judge_of(server, AnswerCache(tmp_path / "answers"), concurrency=1)
        with pytest.raises(ServerError):
            judge([QUESTION] * 10, completions(*range(10)))
    with UnrulyServer(reply=grade) as server:
        judge_of(server, AnswerCache(tmp_path / "answers"))([QUESTION] * 10, completions(*range(10)))
    assert len(server.bodies) == 20 - 7
