"""The ridge start's solver against plain regressions on the tokens themselves, and on streams that are hard on it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.reference import naive_ridge

from peft_psr.training.starts.initialization import fold_of_each
from peft_psr.training.starts.mean_difference import mean_edit
from peft_psr.training.starts.regression import Moments, Regression
from peft_psr.training.starts.ridge import OPENNESS, STRENGTHS, choose_strength, fit_edit, fit_gates, open_basis


WIDTH = 32


def moments_of(stream, difference):
    moments = Moments.zeros(stream.shape[1])
    moments.add(stream, difference)
    return moments


def random_tokens(count=300, width=WIDTH, rank=6, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(count, width, generator=generator, dtype=torch.float64) + 2
    mixing = torch.randn(width, rank, generator=generator, dtype=torch.float64) / width**0.5
    to = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    difference = (stream @ mixing + 1) @ to
    return stream, difference + noise * torch.randn(difference.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_the_edit_does_not_depend_on_its_basis(r):
    stream, difference = random_tokens()
    moments = moments_of(stream, difference)
    edit = fit_edit([moments], r, 0.1)
    gates = stream @ edit.weight.T + edit.bias
    regression = Regression(moments)
    z = regression.directions(r, 0.1)
    fit = regression.gates(z, 0.1)
    torch.testing.assert_close(gates @ edit.direction, (stream @ fit[:-1] + fit[-1]) @ z)
    torch.testing.assert_close(gates.square().mean(0), torch.ones(r, dtype=torch.float64))
    error = (difference - (stream @ fit[:-1] + fit[-1]) @ z).square().sum()
    torch.testing.assert_close(moments.missing(fit, z), error)


def test_gates_are_as_open_as_asked_where_the_mean_allows():
    covariance = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, 0.1], [0.0, 0.1, 0.5]], dtype=torch.float64)
    for mean, open_enough in (([2.0, -2.0, 0.5], True), ([0.3, 0.2, -0.1], False), ([0.0, 0.0, 0.0], False)):
        mean = torch.tensor(mean, dtype=torch.float64)
        turn = open_basis(mean, covariance)
        means, deviations = mean @ turn, (turn * (covariance @ turn)).sum(0).sqrt()
        assert turn.isfinite().all() and torch.linalg.matrix_rank(turn) == 3
        torch.testing.assert_close(means / deviations, (means / deviations)[:1].expand(3))
        if open_enough:
            assert (means / deviations)[0].item() == pytest.approx(OPENNESS)
        elif mean.any():  # right angles after whitening: no basis is more open by as much
            assert 0 < (means / deviations)[0] < OPENNESS


def test_strength_is_the_largest_that_held_out_folds_do_not_speak_against():
    stream, difference = random_tokens(120, noise=3.0)
    parts = [slice(0, 40), slice(40, 80), slice(80, 120)]
    z = torch.linalg.qr(difference[:3].T).Q.T
    errors = torch.zeros(3, len(STRENGTHS), dtype=torch.float64)
    for fold, held_out in enumerate(parts):
        kept = torch.ones(120, dtype=torch.bool)
        kept[held_out] = False
        for k, strength in enumerate(STRENGTHS):
            weight, bias = naive_ridge(stream[kept], difference[kept] @ z.T, strength)
            predicted = (stream[held_out] @ weight.T + bias) @ z
            errors[fold, k] = (difference[held_out] - predicted).square().sum()
    mean = errors.mean(0)
    more = errors - errors[:, mean.argmin()][:, None]
    expected = max(
        strength for k, strength in enumerate(STRENGTHS) if more[:, k].mean() <= more[:, k].std() / math.sqrt(3)
    )
    assert choose_strength([moments_of(stream[part], difference[part]) for part in parts], z) == expected
    assert STRENGTHS[0] < expected < STRENGTHS[-1]


def test_noise_asks_for_more_strength_than_signal():
    chosen = []
    for noise in (0.0, 10.0):
        stream, difference = random_tokens(100, noise=noise)
        folds = [moments_of(stream[:50], difference[:50]), moments_of(stream[50:], difference[50:])]
        chosen.append(choose_strength(folds, torch.linalg.eigh(difference.T @ difference).eigenvectors[:, -2:].T))
    assert chosen[0] < chosen[1]


def test_folds_keep_an_instruction_together_whatever_the_order_of_triplets():
    rows = [{"teacher_input_ids": [1, instruction, question]} for question in range(4) for instruction in (7, 5)]
    folds = fold_of_each(rows, 2)
    assert [int(fold) for fold in folds] == [int(row["teacher_input_ids"][1] == 7) for row in rows]
    assert fold_of_each(rows[:1], 2).tolist() == [0]


def test_a_massive_feature_changes_nothing_for_the_others():
    stream, difference = random_tokens()
    massive = stream.clone()
    massive[:, 3] = massive[:, 3] * 1000 - 5000
    plain, scaled = (fit_edit([moments_of(x.float(), difference)], 2, 0.1) for x in (stream, massive))
    torch.testing.assert_close(
        massive @ scaled.weight.T + scaled.bias, stream @ plain.weight.T + plain.bias, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("case", ["constant", "collinear", "few tokens", "untouched tokens"])
def test_degenerate_streams(case):
    stream, difference = random_tokens(8 if case == "few tokens" else 300)
    if case == "constant":
        stream[:, 5] = 1234.567
    if case == "collinear":
        stream[:, 6:12] = stream[:, :6]
    if case == "untouched tokens":
        difference[100:] = 0
    folds = [moments_of(stream[::2].float(), difference[::2]), moments_of(stream[1::2].float(), difference[1::2])]
    for strength in (1e-6, None):
        edit = fit_edit(folds, 3, strength)
        assert all(part.isfinite().all() for part in edit)
        gates = stream.float().double() @ edit.weight.T + edit.bias
        assert (difference - gates @ edit.direction).square().sum() < difference.square().sum()
        if case == "constant":
            assert edit.weight[:, 5].abs().max() == 0
        if case == "collinear":
            torch.testing.assert_close(edit.weight[:, 6:12], edit.weight[:, :6], atol=1e-4, rtol=1e-3)


def test_ranks_without_use_wait_behind_open_gates_that_differ():
    stream, _ = random_tokens()
    difference = torch.outer(stream[:, 0], torch.arange(1.0, WIDTH + 1, dtype=torch.float64))
    for edit in (fit_edit([moments_of(stream, difference)], 4, 1e-3), mean_edit(moments_of(stream, difference), 4)):
        assert (edit.direction.norm(dim=1) > 0).tolist() == [True, False, False, False]
        gates = stream @ edit.weight.T + edit.bias
        assert ((gates > 0).double().mean(0) > 0.9).all()
        assert torch.linalg.matrix_rank(gates[:, 1:] - gates[:, 1:].mean(0)) == 3


def test_gates_of_given_directions_are_the_plain_regression():
    stream, difference = random_tokens()
    z = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edit = fit_gates([moments_of(stream, difference)], z, 0.3)
    weight, bias = naive_ridge(stream, torch.linalg.lstsq(z.T, difference.T).solution.T, 0.3)
    gates = stream @ edit.weight.T + edit.bias
    torch.testing.assert_close(gates @ edit.direction, (stream @ weight.T + bias) @ z)
    torch.testing.assert_close(gates.square().mean(0), torch.ones(2, dtype=torch.float64))
    assert (gates.mean(0) > 0).all()
    cosine = torch.nn.functional.cosine_similarity(edit.direction, z)
    torch.testing.assert_close(cosine.abs(), torch.ones(2, dtype=torch.float64))
