"""Each objective against numbers worked out by hand, and in pieces against in one go."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import randomize
from helpers.models import VOCABULARY, WIDTH, tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft import get_peft_model

from peft_psr import PSRConfig
from peft_psr.training import TripletCollator
from peft_psr.training.objectives import prediction
from peft_psr.training.objectives.kl import kl_loss
from peft_psr.training.objectives.ll import likelihood_loss
from peft_psr.training.objectives.mse import mse_by_layer
from peft_psr.training.objectives.penalties import gate_regularizer, norm_penalty
from peft_psr.training.objectives.prediction import response_targets
from peft_psr.training.objectives.tokens import row_means
from peft_psr.training.passes.branches import layers_downstream, run_branch
from peft_psr.training.passes.partial import predict


def itself(hidden):
    """A head whose logits are what it is given."""
    return hidden


def test_mse_worked_out_by_hand():
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    student = {"a": torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])}
    teacher = {"a": torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])}
    # per token: (1+1)/2 = 1, 4/2 = 2, 4/2 = 2; row 0: 1.5, row 1: 2
    assert mse_by_layer(student, teacher, mask)["a"].tolist() == [1.5, 2.0]


def test_means_of_rows_without_tokens_are_nothing():
    assert row_means(torch.tensor([1.0, 3.0]), torch.tensor([0, 2]), 4).tolist() == [1.0, 0.0, 3.0, 0.0]


def test_likelihood_worked_out_by_hand_and_its_first_target():
    labels = torch.tensor([[-100, -100, 2, 0]])
    mask = torch.tensor([[0, 1, 1, 1]])
    targets = response_targets(labels, mask)
    assert targets.tolist() == [2, 0, -100]
    logits = torch.tensor([[0.0, 0.0, math.log(2.0)], [0.0] * 3, [9.0] * 3])  # first: p = (1/4, 1/4, 1/2)
    loss = likelihood_loss(itself, logits, targets, mask, 3)
    assert loss.tolist() == pytest.approx([(math.log(2.0) + math.log(3.0)) / 2])


def test_likelihood_gradient_reaches_the_last_prompt_token_and_not_the_last_of_all():
    logits = torch.zeros(4, 3, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    targets = response_targets(torch.tensor([[-100, -100, 1, 2, 1]]), mask)
    likelihood_loss(itself, logits, targets, mask, 3).sum().backward()
    assert logits.grad.abs().sum(-1).ne(0).tolist() == [True, True, True, False]


def test_kl_worked_out_by_hand():
    mask = torch.tensor([[1, 1], [1, 1]])
    targets = torch.tensor([0, -100, 1, -100])
    teacher = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1], [1.0, 0.0]]).log()
    student = torch.tensor([[0.25, 0.75], [0.0, 1.0], [0.9, 0.1], [0.0, 1.0]]).log()
    loss = kl_loss(itself, student, teacher, targets, mask, 2, itself)
    assert loss.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0], abs=1e-6)


def test_regularizer_worked_out_by_hand():
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    gates = torch.tensor([[0.25, 0.0], [0.5, 2.0], [3.0, 0.5]])
    # rank 0: max(0, 1 - .75) = .25 and 0; rank 1: 0 and .5
    assert gate_regularizer(gates, mask).tolist() == [0.25, 0.5]


def test_norm_penalty_is_the_edit_over_the_stream():
    torch.manual_seed(0)
    gates, direction, stream = torch.rand(3, 2), torch.randn(2, 2, 5), torch.randn(3, 5)
    strength = torch.tensor([0.5, -2.0])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    got = norm_penalty(gates, direction, strength, stream, mask)
    edits = [s * g @ z for s, g, z in zip([0.5, 0.5, -2.0], gates, direction[[0, 0, 1]], strict=True)]
    shares = [float(edit.square().sum() / h.square().sum()) for edit, h in zip(edits, stream, strict=True)]
    assert got.tolist() == pytest.approx([(shares[0] + shares[1]) / 2, shares[2]], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma"])  # Gemma caps its logits
def test_kl_equals_the_plain_formula_on_the_models_own_logits_whole_and_in_pieces(name, monkeypatch):
    model = get_peft_model(tiny_model(name), PSRConfig(init_weights=False))
    randomize(model, ".direction", seed=7, std=0.3)
    for layer in model.psr_layers().values():
        layer.unit("default").gate_bias.data.fill_(1.0)
    batch = TripletCollator(tiny_tokenizer())(triplets())
    last = layers_downstream(model)[-1:]
    teacher = run_branch(model, batch, last, "teacher", logits=True)
    weights = [p for n, p in model.named_parameters() if "psr_unit" in n]

    student = run_branch(model, batch, last, "student", logits=True)
    expected = []
    for row, row_labels in enumerate(batch["labels"]):
        n = int((row_labels != -100).sum())
        end = int(batch["attention_mask"][row].sum()) - 1
        teacher_end = int(batch["teacher_attention_mask"][row].sum()) - 1
        p = F.log_softmax(teacher.logits[row, teacher_end - n : teacher_end], dim=-1)
        q = F.log_softmax(student.logits[row, end - n : end], dim=-1)
        expected.append((p.exp() * (p - q)).sum(-1).mean())
    expected = torch.stack(expected)
    expected_grads = torch.autograd.grad(expected.sum(), weights)

    mask = batch["steering_mask"]
    targets = response_targets(batch["labels"], mask)
    for at_once in (2**25, 3 * VOCABULARY):
        monkeypatch.setattr(prediction, "LOGITS_AT_ONCE", at_once)
        student = run_branch(model, batch, last, "student")
        rows = []

        def head(hidden, rows=rows):
            rows.append(len(hidden))
            return predict(model, hidden)

        args = (head, student.hidden[last[0]], teacher.hidden[last[0]], targets, mask, VOCABULARY, head)
        loss = kl_loss(*args)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
        grads = torch.autograd.grad(loss.sum(), weights)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
        assert max(rows) == (int((targets != -100).sum()) if at_once > 1000 else 3)
    assert WIDTH == student.hidden[last[0]].shape[-1]
