"""Sampling from an OpenAI-compatible server: every mishap, the counts, the limits, and the key that must not leak."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from email.utils import formatdate

import pytest
from helpers.unruly_server import MISHAPS, MODEL, UnrulyServer, at_random, reply_text

from peft_psr.training.data.draws import Completion, Draw, Failure
from peft_psr.training.sampling.chat_server import ChatServer, Request, ServerError, TooManyFailures, _is_loopback
from peft_psr.training.sampling.server import ServerSampler
from peft_psr.training.sampling.server_replies import retry_after
from peft_psr.training.sampling.server_settings import LIMITS


pytestmark = pytest.mark.usefixtures("no_key")


KEY = "sk-Very/Secret+Key=42"
KIND = {
    "429": "rate_limited",
    "500": "server_error",
    "cut": "connection",
    "hang_up": "connection",
    "html": "malformed",
}


def draws(count, prompt=None):
    return [Draw(f"t/{i}", prompt or [{"role": "user", "content": f"question {i}"}], 1000 + i) for i in range(count)]


def client(server, **settings):
    return ChatServer(server.url, **{"model": MODEL, "concurrency": 8, "timeout": 0.3, "backoff": 0.01, **settings})


def test_requests_and_samples():
    with UnrulyServer() as server:
        sampler = ServerSampler(client(server), max_new_tokens=5, temperature=0.7)
        plain = Draw("t/text", "once upon", 7)
        outcomes = {draw.id: outcome for draw, outcome in sampler([*draws(3), plain])}
    assert outcomes == {f"t/{_number(body)}": Completion(reply_text(body), False, 7, 2) for body in server.bodies}
    assert sorted(body["seed"] for body in server.bodies) == [7, 1000, 1001, 1002]
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == (MODEL, 0.7, 1.0, 5)
        assert "messages" in body or body["prompt"] == "once upon"
    assert sampler.server.usage == {"calls": 4, "prompt_tokens": 28, "completion_tokens": 8}
    assert sampler.server.counts == {"requests": 4, "answered": 4}
    described = sampler.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["seen"] == {"models": [MODEL], "system_fingerprints": ["fp_1"]}
    assert "same requests" in described["not_reproducible"]


def _number(body):
    return "text" if "prompt" in body else body["messages"][0]["content"].split()[-1]


def test_truncated_and_empty():
    with UnrulyServer(reply=lambda body: "" if _number(body) == "0" else "a b c d") as server:
        sampler = ServerSampler(client(server), max_new_tokens=3)
        samples = {draw.id: sample for draw, sample in sampler(draws(2))}
    assert samples["t/0"].text == "" and not samples["t/0"].truncated
    assert samples["t/1"].text == "a b c d" and samples["t/1"].truncated


@pytest.mark.parametrize("mishap", MISHAPS)
def test_each_mishap_is_retried_and_counted(mishap):
    with UnrulyServer(lambda body, attempt: mishap if attempt < 2 else "ok") as server:
        sampler = ServerSampler(client(server))
        outcomes = list(sampler(draws(1)))
    counts = sampler.server.counts
    assert [outcome.text for _, outcome in outcomes] == [reply_text(server.bodies[0])]
    assert counts == {"requests": 3, "answered": 1, "retried": 2, KIND.get(mishap, mishap): 2}


def test_retry_after_is_waited_for_by_all():
    slow = {"messages": draws(1)[0].prompt}
    with UnrulyServer(
        lambda body, attempt: "429" if body["messages"] == slow["messages"] and attempt == 0 else "ok",
        retry_after="0.5",
        delay=0.02,
    ) as server:
        chat = client(server, concurrency=1)
        list(ServerSampler(chat)(draws(2)))
    assert len(server.times) == 3 and server.times[1] - server.times[0] >= 0.5
    with UnrulyServer(lambda body, attempt: "429", retry_after="3600") as server:
        outcomes = list(ServerSampler(client(server))(draws(1)))
    assert isinstance(outcomes[0][1], Failure) and len(server.times) == 1


def test_retry_after_dates():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert 8 < retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) <= 10
    assert retry_after({"retry-after": formatdate(time.time() - 10, usegmt=True)}) == 0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


def test_backoff_grows():
    with UnrulyServer(lambda body, attempt: "500" if attempt < 3 else "ok") as server:
        list(ServerSampler(client(server, backoff=0.1))(draws(1)))
    pauses = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    for pause, full in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert full / 2 <= pause < full + 0.15


def test_a_mixture_of_mishaps_gives_the_well_behaved_set():
    with UnrulyServer() as server:
        expected = {draw.id: outcome for draw, outcome in ServerSampler(client(server))(draws(60))}
    with UnrulyServer(at_random(seed=1), stall=0.4) as server:
        chat = client(server, concurrency=20)
        outcomes = list(ServerSampler(chat)(draws(60)))
    assert {draw.id: outcome for draw, outcome in outcomes} == expected and len(outcomes) == 60
    mishaps = {KIND.get(name, name) for name in MISHAPS}
    assert mishaps <= set(chat.counts) and chat.counts["failed"] == 0 and chat.counts["answered"] == 60
    assert chat.counts["requests"] == 60 + chat.counts["retried"] == 60 + sum(chat.counts[name] for name in mishaps)


def test_many_in_flight_within_the_limit_and_no_more_than_are_taken():
    with UnrulyServer(delay=0.05) as server:
        chat = client(server, concurrency=6)
        outcomes = ServerSampler(chat)(draws(40))
        next(outcomes)
        time.sleep(0.5)  # nobody takes results: the requests stop
        assert len(server.bodies) <= 2 * 6 + 1
        assert len(list(outcomes)) == 39
    assert server.most_in_flight == 6


def test_closing_cancels_what_is_in_flight():
    with UnrulyServer(lambda body, attempt: "ok" if _number(body) == "0" else "timeout", stall=5) as server:
        outcomes = ServerSampler(client(server, timeout=60))(draws(50))
        assert next(outcomes)[0].id == "t/0"
        started = time.monotonic()
        outcomes.close()
        assert time.monotonic() - started < 1
        time.sleep(0.3)  # the server's threads may be a little behind what was sent
        sent = len(server.bodies)
        time.sleep(0.3)
        assert len(server.bodies) == sent < 50
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("requests to")]


def test_too_many_failures_stop_the_run_and_keep_what_it_has():
    def behave(body, attempt):
        return "500" if int(_number(body)) >= 10 else "ok"

    with UnrulyServer(behave) as server:
        chat = client(server, concurrency=2, max_retries=1, max_failure_share=0.25, min_requests=8)
        got = []
        with pytest.raises(TooManyFailures, match=r"of \d+ requests to 127.0.0.1.*max_failure_share = 0.25") as caught:
            for pair in ServerSampler(chat)(draws(100)):
                got.append(pair)
    kept = [draw.id for draw, outcome in got if isinstance(outcome, Completion)]
    assert sorted(kept) == sorted(f"t/{i}" for i in range(10))
    failed = [outcome for _, outcome in got if isinstance(outcome, Failure)]
    assert 3 <= len(failed) <= 6 and all("500" in failure.reason for failure in failed)
    assert caught.value.counts["answered"] == 10 and caught.value.counts["server_error"] >= 8
    assert "500" in str(caught.value)


def test_few_failures_do_not_stop_it():
    with UnrulyServer(lambda body, attempt: "500" if _number(body) == "0" else "ok") as server:
        chat = client(server, max_retries=1, max_failure_share=0.1, min_requests=20)
        outcomes = list(ServerSampler(chat)(draws(30)))
    assert [draw.id for draw, outcome in outcomes if isinstance(outcome, Failure)] == ["t/0"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [("401", "OPENAI_API_KEY is not set"), ("403", "403, the API key is refused or has no access")],
)
def test_refused_keys_stop_at_once(status, expected):
    with UnrulyServer(lambda body, attempt: status) as server:
        with pytest.raises(ServerError, match=expected):
            list(ServerSampler(client(server, concurrency=1))(draws(10)))
    assert len(server.bodies) == 1


def test_unknown_model_names_those_there_are():
    with UnrulyServer() as server:
        chat = client(server, model="gradr", concurrency=1)
        with pytest.raises(ServerError, match="'gradr'.*404.*does not exist.*It lists grader") as caught:
            list(ServerSampler(chat)(draws(10)))
        assert len(server.bodies) == 1 and "/v1." not in str(caught.value)
        assert chat.models() == [MODEL]
        bare = ChatServer(server.url.removesuffix("/v1"), MODEL)
        with pytest.raises(ServerError, match="usually ends in /v1"):
            list(ServerSampler(bare)(draws(1)))
        with pytest.raises(ServerError, match="does not list its models"):
            bare.models()


def test_bad_requests_stop_only_if_none_is_answered():
    with UnrulyServer(lambda body, attempt: "400") as server:
        with pytest.raises(ServerError, match="refuses requests.*400"):
            list(ServerSampler(client(server, concurrency=1))(draws(10)))
    assert len(server.bodies) == 3
    with UnrulyServer(lambda body, attempt: "400" if int(_number(body)) in (0, 1, 5, 6) else "ok") as server:
        chat = client(server, max_failure_share=0.5)
        outcomes = list(ServerSampler(chat)(draws(20)))
    assert len(server.bodies) == 20 and chat.counts["refused"] == chat.counts["failed"] == 4
    assert sum(isinstance(outcome, Failure) for _, outcome in outcomes) == 4


def test_no_server():
    with UnrulyServer() as server:
        pass
    outcomes = list(ServerSampler(client(server, max_retries=1))(draws(2)))
    assert all("connection failed" in outcome.reason for _, outcome in outcomes)


@pytest.mark.parametrize("mishap", ["401", "403", "404", "400", "500", "429", "malformed", "cut"])
def test_the_key_never_shows(mishap, monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    shown = []
    with UnrulyServer(lambda body, attempt: mishap, retry_after="0.01") as server:
        chat = client(server, max_retries=1, min_requests=4)
        sampler = ServerSampler(chat)
        try:
            for _, outcome in sampler(draws(20)):
                shown.append(repr(outcome))
        except (ServerError, TooManyFailures) as error:
            lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
            shown += [*lines, repr(vars(error))]
            linked = error
            while linked is not None:
                shown += [repr(linked), repr(vars(linked))]
                linked = linked.__cause__ or linked.__context__
        else:
            pytest.fail("nothing stopped the run")
    assert server.keys == {f"Bearer {KEY}"}
    shown += [repr(chat), str(vars(chat)), json.dumps(sampler.describe()), caplog.text, *capfd.readouterr()]
    assert not [text for text in shown if KEY in text or KEY[3:15] in text]


def test_keys_are_read_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    with UnrulyServer() as server:
        list(ServerSampler(client(server, api_key_variable="MY_KEY"))(draws(1)))
        monkeypatch.setenv("MY_KEY", "sk-\u00e4secret")
        with pytest.raises(ValueError, match="MY_KEY holds characters") as caught:
            list(ServerSampler(client(server, api_key_variable="MY_KEY"))(draws(1)))
    assert server.keys == {f"Bearer {KEY}"}
    text = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "secret" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "must look like http"),
        ({"base_url": "http://me:hunter2@host/v1"}, "holds a user name, password or query"),
        ({"base_url": "http://host/v1?key=hunter2"}, "holds a user name, password or query"),
        ({"model": ""}, "got an empty one"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"max_failure_share": 2}, "between 0 and 1, got 2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        ChatServer(**{"base_url": "http://host/v1", "model": MODEL, **settings})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1}])
def test_bad_sampling(settings):
    with pytest.raises(ValueError, match="must"):
        ServerSampler(ChatServer("http://host/v1", MODEL), **settings)


def test_an_error_in_the_requests_reaches_the_caller():
    def requests():
        yield 0, Request("a", {"max_tokens": 5})
        raise KeyError("broken")

    with UnrulyServer() as server, pytest.raises(KeyError, match="broken"):
        list(client(server).stream(requests()))


# ---------------------------------------------------------------- what servers differ in


@pytest.mark.parametrize(
    ("error", "kind", "action"),
    [
        ({"message": "slow down", "code": 429}, "rate_limited", "retry"),
        ({"message": "slow down", "code": "rate_limit_exceeded"}, "rate_limited", "retry"),
        ({"message": "upstream is down", "code": 502}, "server_error", "retry"),
        ("out of memory", "server_error", "retry"),
        ({"message": "no such model", "code": "404"}, "not_found", "stop"),
        ({"message": "who?", "type": "authentication_error"}, "denied", "stop"),
        ({"message": "no money", "code": 402}, "no_credit", "stop"),
        ({"message": "too long", "code": "context_length_exceeded"}, "refused", "fail"),
    ],
)
@pytest.mark.parametrize("in_choice", [False, True])
def test_an_error_with_status_200(error, kind, action, in_choice):
    body = {"choices": [{"index": 0, "error": error}]} if in_choice else {"error": error}
    said = error if isinstance(error, str) else error["message"]
    with UnrulyServer(lambda request, attempt: "ok" if attempt else json.dumps(body).encode()) as server:
        chat = client(server, concurrency=1)
        if action == "stop":
            with pytest.raises(ServerError, match="401, the API key" if kind == "denied" else said):
                list(ServerSampler(chat)(draws(1)))
        else:
            ((_, outcome),) = ServerSampler(chat)(draws(1))
            assert outcome == (
                Completion(reply_text(server.bodies[0]), False, 7, 2)
                if action == "retry"
                else Failure(f"the answer is an error: {said}")
            )
    assert chat.counts[kind] == 1 and len(server.bodies) == (2 if action == "retry" else 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_stands_before_this_machine(host, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")  # which takes a package that may be missing
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with UnrulyServer() as server:
        chat = ChatServer(server.url.replace("127.0.0.1", host), MODEL, max_retries=0)
        assert chat.models() == [MODEL]
        assert isinstance(next(ServerSampler(chat)(draws(1)))[1], Completion)


def test_loopback_by_every_name():
    assert all(
        map(_is_loopback, ("localhost", "LocalHost", "a.localhost", "127.0.0.1", "127.8.0.1", "::1", "0.0.0.0"))
    )
    assert not any(map(_is_loopback, ("api.openai.com", "10.0.0.1", "localhost.example", "8.8.8.8", "")))


@pytest.mark.parametrize(("refused", "taken"), [LIMITS, LIMITS[::-1]])
def test_the_name_of_the_token_limit_is_learnt_once(refused, taken):
    words = f"400 Unsupported parameter: {refused!r} is not supported with this model."
    with UnrulyServer(lambda body, attempt: words if refused in body else "ok") as server:
        chat = client(server, concurrency=4)
        requests = [(i, Request([{"role": "user", "content": str(i)}], {refused: 5})) for i in range(30)]
        outcomes = dict(chat.stream(requests))
    assert len(outcomes) == 30 and not [o for o in outcomes.values() if isinstance(o, Failure)]
    assert sum(refused in body for body in server.bodies) <= 4 and all(
        body[taken] == 5 for body in server.bodies if refused not in body
    )
    assert chat.counts["refused"] == 0 and chat.counts["adapted"] == sum(refused in body for body in server.bodies)


def test_a_limit_that_is_too_large_is_no_other_name():
    words = "400 'max_tokens' or 'max_completion_tokens' is too large: 256. The context length is 128."
    with UnrulyServer(lambda body, attempt: words) as server:
        with pytest.raises(ServerError, match="too large: 256"):
            list(ServerSampler(client(server, concurrency=1))(draws(10)))
    assert len(server.bodies) == 3 and all("max_tokens" in body for body in server.bodies)


def test_half_a_character_is_left_out():
    choice = b'{"index": 0, "finish_reason": "length", "message": {"content": "t\\ud83dea \\ud83d"}}'
    body = b'{"model": "grader", "choices": [' + choice + b"]}"
    with UnrulyServer(lambda request, attempt: body) as server:
        ((_, sample),) = ServerSampler(client(server))(draws(1))
    assert sample.text == "tea " and sample.truncated
