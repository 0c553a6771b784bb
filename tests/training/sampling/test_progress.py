"""How far a long job is: what is left from what is done, on a terminal and where output is piped."""

from __future__ import annotations

import io
import logging
import threading
import time
from types import SimpleNamespace

import pytest
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import USER

from peft_psr.training import sample_completions
from peft_psr.training.progress import Progress
from peft_psr.training.runs.train.assembly import StepProgress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("peft_psr.training.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_what_is_left_is_told_from_whole_batches(clock):
    progress = Progress("sampling", 1000, done=400)
    assert progress.line() == "sampling: 400 of 1000 (40%)"
    clock[0] += 60
    progress.advance(tokens=100)  # the first of a batch of 60 says nothing of the others
    assert progress.line() == "sampling: 401 of 1000 (40%), 100 tokens"
    for _ in range(59):
        clock[0] += 0.001
        progress.advance(tokens=100)
    clock[0] += 30
    assert progress.line() == "sampling: 460 of 1000 (46%), 1.0 s each, 6,000 tokens, 9 min left"
    clock[0] += 30
    progress.advance(tokens=100, failures=2)  # of the next batch
    assert progress.line().endswith("1.0 s each, 6,100 tokens, 2 failed, 9 min left")


def test_what_is_left_is_told_from_a_steady_flow(clock):
    progress = Progress("training", 1000)
    for _ in range(10):
        clock[0] += 0.1
        progress.advance()
    assert "left" not in progress.line()
    for _ in range(10):
        clock[0] += 0.1
        progress.advance()
    assert progress.line() == "training: 20 of 1000 (2%), 10.0/s, 2 min left"


def test_one_thing_is_no_evidence(clock):
    progress = Progress("cells", 10)
    clock[0] += 60
    progress.advance()
    clock[0] += 60
    assert progress.line() == "cells: 1 of 10 (10%)"
    progress.advance()
    clock[0] += 60
    assert progress.line() == "cells: 2 of 10 (20%), 60 s each, 8 min left"


def test_what_was_kept_says_nothing_of_the_rest(clock):
    progress = Progress("cells", 10)
    for _ in range(6):
        progress.advance(kept=True)
    clock[0] += 100
    assert progress.line() == "cells: 6 of 10 (60%)"
    for _ in range(2):
        clock[0] += 100
        progress.advance()
    clock[0] += 100
    assert progress.line() == "cells: 8 of 10 (80%), 2 min each, 5 min left"


@pytest.mark.parametrize("listened", [True, False])
def test_a_line_now_and_then_while_nothing_arrives(caplog, capsys, listened):
    caplog.set_level(logging.INFO if listened else logging.WARNING, "peft_psr.training")
    with Progress("sampling", 3, interval=0.02) as progress:
        time.sleep(0.15)
        progress.advance(3)
    lines = [record.getMessage() for record in caplog.records] if listened else capsys.readouterr().err.splitlines()
    assert lines.count("sampling: 0 of 3 (0%)") >= 2
    assert not [thread for thread in threading.enumerate() if thread.name == "progress of sampling"]


def test_nothing_is_shown_unless_asked_for(caplog, capsys):
    caplog.set_level(logging.INFO, "peft_psr.training")
    sample_completions(tiny_model(), tiny_tokenizer(), [[USER]], max_new_tokens=2)
    assert not caplog.records and capsys.readouterr() == ("", "")
    sample_completions(tiny_model(), tiny_tokenizer(), [[USER]], max_new_tokens=2, progress="answers")
    assert caplog.records[-1].getMessage().startswith("answers: 1 of 1 (100%)")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    with Progress("sampling", 3) as progress:
        for _ in range(3):
            progress.advance(tokens=1000)
    assert "sampling" in screen.getvalue() and "3/3" in screen.getvalue() and "3,000 tokens" in screen.getvalue()


def test_a_bar_without_a_total(monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    with Progress("persona", None) as progress:
        progress.total = 2
        progress.title = "persona, formal"
        progress.advance(2)
    assert "persona, formal" in screen.getvalue()


def test_steps_of_a_training(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "peft_psr.training")
    shown, state = StepProgress("formal"), SimpleNamespace(max_steps=10, global_step=4)
    shown.on_train_begin(None, state, None)
    shown.on_log(None, state, None, {"loss": 0.5})
    for _ in range(6):
        shown.on_step_end(None, state, None)
    shown.on_train_end(None, state, None)
    first, last = [record.getMessage() for record in caplog.records]
    assert first == "formal: 4 of 10 done before" and last.startswith("formal: 10 of 10 (100%)") and "loss 0.5" in last
