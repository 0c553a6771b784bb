"""Threads are chosen by the model's size, unless the user has said."""

from __future__ import annotations

import pytest
import torch

from peft_psr.base_model import threads


@pytest.fixture
def four_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "_BEFORE", 4)
    monkeypatch.setattr(threads, "_chosen", 4)
    yield
    torch.set_num_threads(before)


def test_threads_by_size(four_threads, monkeypatch):
    model = torch.nn.Linear(10, 10)
    threads.choose_threads(model, {})
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(threads, "SMALL", 50)
    threads.choose_threads(model, {})
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("variable", threads.VARIABLES)
def test_what_the_user_said_stays(variable, four_threads):
    threads.choose_threads(torch.nn.Linear(10, 10), {variable: "2"})
    assert torch.get_num_threads() == 4
    torch.set_num_threads(3)
    threads.choose_threads(torch.nn.Linear(10, 10), {})
    assert torch.get_num_threads() == 3
