"""Gates and directions of one layer, fitted to sums over tokens in closed form.

With A (tokens x d) the student's stream and D (tokens x d) what is missing in it, an edit of rank r whose gates are
all open is a reduced-rank ridge regression of D on A:

    min  mean_tokens |D - (A W^T + b) Z|^2 + strength * sum_j variance_j |(W^T Z)_j|^2      W, Z (r, d), b (r,)

The penalty goes by each feature's variance, so that a feature of huge scale neither escapes it nor sets it for the
others. Z spans the main directions of what the ridge fit of full rank says of D, its mean included.

A ReLU gate can't change sign. So of all bases of that span one is taken in which gates are open: W and Z are turned
until the mean of every gate lies `OPENNESS` standard deviations above 0, or as far as the data allow; their product,
and with it the edit, stays what it was wherever gates are open.

All of this needs only `Moments`, some d x d numbers whatever the count of tokens. Reduced-rank ridge regression:
Mukherjee & Zhu (2011). Other ways that were tried: docs/results.md.
"""

from collections.abc import Sequence

import torch

from .mean_difference import MEAN_DIFFERENCE
from .regression import Edit, Moments, Regression
from .start import DataStart, Wanted


STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-12, 5))
"""Ridge strengths that are tried, relative to the variance of the features."""

FIRST_STRENGTH = 0.1
"""Strength by which directions are found before one is chosen, and the one where nothing can be held out."""

OPENNESS = 2.5

FOLDS = 2


class Ridge(DataStart):
    """The start "ridge"; a constant gate, which has nothing to fit, gets the mean difference."""

    def folds(self, wanted: Wanted) -> int:
        """Two where a strength is to be chosen."""
        return FOLDS if wanted.gated and wanted.strength is None else 1

    def edit(self, folds: Sequence[Moments], wanted: Wanted) -> Edit:
        """Gates and directions together, or the gates alone where directions are given."""
        if not wanted.gated:
            return MEAN_DIFFERENCE.edit(folds, wanted)
        if wanted.directions is None:
            return fit_edit(folds, wanted.r, wanted.strength)
        return fit_gates(folds, wanted.directions, wanted.strength)


RIDGE = Ridge()


def choose_strength(folds: Sequence[Moments], z: torch.Tensor) -> float:
    """The largest of `STRENGTHS` whose held-out error for z (r, d) is within one standard error of the smallest.

    Each fold's sums are predicted by the fit to all others; neither takes a look at the tokens again.
    """
    if len(folds) < 2:
        return FIRST_STRENGTH
    total = sum(folds[1:], folds[0])
    errors = []
    for fold in folds:
        regression = Regression(total - fold)
        errors.append([fold.missing(regression.gates(z, strength), z) / total.square for strength in STRENGTHS])
    table = torch.tensor(errors)  # (folds, strengths)
    mean = table.mean(dim=0)
    best = int(mean.argmin())
    # of the difference to the best one: folds that are hard at any strength have no say
    more = table - table[:, best : best + 1]
    allowed = mean - mean[best] <= more.std(dim=0) / len(folds) ** 0.5
    return STRENGTHS[int(allowed.nonzero().max())]


def open_basis(mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """R (r, r) such that gates g @ R are as open as they can be, each with a mean square of 1.

    `mean` (r,) and `covariance` (r, r) are those of the gates g over tokens.
    """
    r = len(mean)
    values, vectors = torch.linalg.eigh(covariance)
    # ranks that hardly vary are not blown up without bound: their directions would grow as much, and cancel
    values = values.clamp(min=max(1e-4 * values[-1].item(), torch.finfo(values.dtype).tiny))
    whiten = vectors * values.rsqrt() @ vectors.T
    distance = (whiten @ mean).norm()
    even = torch.full_like(mean, r**-0.5)
    axis = whiten @ mean / distance if distance > 0 else even
    # a reflection that takes the even axis to the gates' own: its columns lie around that axis, r of them at right
    # angles; drawn together towards it they are more open
    across = even - axis
    reflection = torch.eye(r, dtype=mean.dtype, device=mean.device)
    if across.norm() > 1e-9:
        reflection -= 2 * torch.outer(across, across) / across.square().sum()
    cosine = min(0.98, max(r**-0.5, OPENNESS / max(distance.item(), 1e-9)))
    around = reflection - torch.outer(axis, axis @ reflection)
    basis = axis[:, None].expand(r, r)
    if r > 1:
        basis = cosine * basis + (1 - cosine**2) ** 0.5 * around / around.norm(dim=0)
    turn = whiten @ basis
    return turn / ((mean @ turn).square() + (turn * (covariance @ turn)).sum(dim=0)).sqrt()


def fit_edit(folds: Sequence[Moments], r: int, strength: float | None) -> Edit:
    """The edit of rank r by reduced-rank ridge regression, in an open basis, from sums over the tokens of some folds.

    Ranks that the data has nothing for get a direction of 0 and an open gate. The strength is relative to the
    features'
    variance; `None` chooses it by held-out error.
    """
    total = sum(folds[1:], folds[0])
    regression = Regression(total)
    if strength is None:
        strength = choose_strength(folds, regression.directions(r, FIRST_STRENGTH))
    z = regression.directions(r, strength)
    fit = regression.gates(z, strength)
    tokens = total.gram[-1, -1]
    mean = total.gram[-1] @ fit / tokens
    turn = open_basis(mean, fit.T @ total.gram @ fit / tokens - torch.outer(mean, mean))
    fit, z = fit @ turn, torch.linalg.solve(turn, z)
    weight, bias = regression.waiting_gates(r - len(z))
    return Edit(torch.cat([fit[:-1].T, weight]), torch.cat([fit[-1], bias]), torch.cat([z, z.new_zeros(weight.shape)]))


def fit_gates(folds: Sequence[Moments], z: torch.Tensor, strength: float | None) -> Edit:
    """The edit along given directions z (r, d), which are scaled so that each gate's mean square is 1.

    The scale is negative for a direction that the prompt moves away from: a gate can't be.
    """
    total = sum(folds[1:], folds[0])
    fit = Regression(total).gates(z, choose_strength(folds, z) if strength is None else strength)
    tokens = total.gram[-1, -1]
    size = ((fit * (total.gram @ fit)).sum(dim=0) / tokens).sqrt()
    # a direction that takes no part is left at its length, with a gate of 0
    scale = torch.where(size > 0, size, 1.0) * torch.where(total.gram[-1] @ fit < 0, -1.0, 1.0)
    fit = fit / scale
    return Edit(fit[:-1].T, fit[-1], z * scale[:, None])
