"""A loopback OpenAI-compatible server that answers by rule and misbehaves on command."""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


MODEL = "grader"
MISHAPS = ("timeout", "429", "500", "cut", "malformed", "html", "empty_choices", "hang_up")
"""Those that a client should retry."""


def reply_text(body: dict) -> str:
    """The well-behaved answer: by what is asked alone."""
    asked = json.dumps([body.get("messages"), body.get("prompt"), body.get("seed")])
    return "word " + hashlib.sha256(asked.encode()).hexdigest()[:12]


class UnrulyServer:
    """Serves while it is entered.

    `behave(body, attempt)` gives "ok", one of `MISHAPS`, or a status such as "401" with or without words after it;
    attempt counts equal bodies from 0; or the bytes of an answer with status 200. `reply(body)` gives the text, or
    (text, tokens) with tokens a list of (token, {token: probability}).
    """

    def __init__(self, behave=lambda body, attempt: "ok", reply=reply_text, delay=0.0, stall=1.0, retry_after="0.05"):
        self.behave, self.reply, self.delay, self.stall, self.retry_after = behave, reply, delay, stall, retry_after
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.keys: set[str | None] = set()
        self.in_flight = self.most_in_flight = 0
        self.attempts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(_Handler):
            server_state = outer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def at_random(seed: int = 0, share: float = 0.5, worst: int = 3):
    """A behaviour: each of the first `worst` attempts of a request meets a mishap with this probability."""

    def behave(body, attempt):
        dice = random.Random(f"{seed}/{json.dumps(body, sort_keys=True)}/{attempt}")
        return dice.choice(MISHAPS) if attempt < worst and dice.random() < share else "ok"

    return behave


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: UnrulyServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/v1/models":
            return self._send({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        self._error(404, "no such path")

    def do_POST(self):
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != ("/v1/completions" if "prompt" in body else "/v1/chat/completions"):
            return self._error(404, "no such path")
        with state.lock:
            state.times.append(time.monotonic())
            state.bodies.append(body)
            state.keys.add(self.headers.get("Authorization"))
            key = json.dumps(body, sort_keys=True)
            attempt = state.attempts[key]
            state.attempts[key] += 1
            state.in_flight += 1
            state.most_in_flight = max(state.most_in_flight, state.in_flight)
        try:
            time.sleep(state.delay)
            self._behave(body, state.behave(body, attempt))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with state.lock:
                state.in_flight -= 1

    def _behave(self, body, how):
        state = self.server_state
        if body["model"] != MODEL:
            return self._error(404, f"The model {body['model']} does not exist")
        if isinstance(how, bytes):
            return self._send(how)
        if how == "ok":
            return self._answer(body)
        if how == "timeout":
            time.sleep(state.stall)
            return self._answer(body)
        if how == "hang_up":
            self.close_connection = True
            return None
        if how == "cut":
            self.close_connection = True
            return self._send(b'{"choices": [{"mess', length=400)
        if how == "malformed":
            return self._send(b'{"choices": [{"message": {"content": "wo')
        if how == "html":
            return self._send(b"<html>Bad gateway</html>", kind="text/html")
        if how == "empty_choices":
            return self._send({"choices": [], "model": MODEL})
        headers = {"Retry-After": state.retry_after} if how == "429" else {}
        # a server that quotes the key it was given, as some do
        return self._error(int(how.split()[0]), f"{how} for {self.headers.get('Authorization')}", headers)

    def _answer(self, body):
        reply = self.server_state.reply(body)
        text, tokens = reply if isinstance(reply, tuple) else (reply, None)
        limit = body.get("max_completion_tokens") or body["max_tokens"]
        choice = {"index": 0, "finish_reason": "stop" if len(text.split()) <= limit else "length"}
        if "prompt" in body:
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text}
        if tokens and body.get("logprobs"):
            choice["logprobs"] = {"content": [_token(*token, limit=body["top_logprobs"]) for token in tokens]}
        self._send(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": MODEL,
                "system_fingerprint": "fp_1",
                "choices": [choice],
                "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
            }
        )

    def _error(self, status, message, headers=None):
        self._send({"error": {"message": message, "type": "error"}}, status, headers=headers)

    def _send(self, content, status=200, length=None, kind="application/json", headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": length or len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


def _token(token: str, candidates: dict[str, float], limit: int) -> dict:
    likeliest = sorted(candidates, key=lambda t: -candidates[t])[:limit]
    top = [{"token": t, "logprob": math.log(candidates[t]), "bytes": None} for t in likeliest]
    return {"token": token, "logprob": math.log(candidates[token]), "bytes": None, "top_logprobs": top}
