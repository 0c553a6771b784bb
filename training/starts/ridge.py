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

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-12, 5))
"""Ridge strengths that are tried, relative to the variance of the features."""

FIRST_STRENGTH = 0.1
"""Strength by which directions are found before one is chosen, and the one where nothing can be held out."""

OPENNESS = 2.5


class Edit(NamedTuple):
    """Weights of one layer, float64: w (r, d), b (r,), z (r, d)."""

    weight: torch.Tensor
    bias: torch.Tensor
    direction: torch.Tensor


@dataclass
class Moments:
    """Sums over tokens, float64; about 16 d^2 bytes: 0.27 GB at d = 4096.

    Attributes:
        gram: Sum of a a^T with a = (A, 1), (d + 1, d + 1); its last entry counts the tokens.
        cross: Sum of a D^T, (d + 1, d).
        square: Sum of |D|^2, ().
    """

    gram: torch.Tensor
    cross: torch.Tensor
    square: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Of no tokens, for a stream of `width` features."""
        shapes = ((width + 1, width + 1), (width + 1, width), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, stream: torch.Tensor, difference: torch.Tensor) -> None:
        """Add tokens: A (tokens, d) and D (tokens, d)."""
        inputs = torch.cat([stream, stream.new_ones(stream.shape[0], 1)], dim=1).to(self.gram)
        outputs = difference.to(self.gram)
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, outputs)
        self.square += outputs.square().sum()

    def __add__(self, other: Moments) -> Moments:
        """Of the tokens of both."""
        return Moments(self.gram + other.gram, self.cross + other.cross, self.square + other.square)

    def __sub__(self, other: Moments) -> Moments:
        """Of the tokens without those of `other`."""
        return Moments(self.gram - other.gram, self.cross - other.cross, self.square - other.square)

    @property
    def mean_difference(self) -> torch.Tensor:
        """Mean of D, (d,)."""
        return self.cross[-1] / self.gram[-1, -1]

    def missing(self, fit: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Sum of |D - (a @ fit) @ z|^2, () for `fit` (d + 1, r), with gates that are never closed."""
        predicted = (fit.T @ self.gram @ fit * (z @ z.T)).sum()
        return self.square - 2 * (fit.T @ self.cross * z).sum() + predicted


class Regression:
    """Ridge regressions of D on A over some tokens, for any strength, by one eigendecomposition of d x d.

    Constant features get no weight; collinear ones, and more features than tokens, share it.

    Args:
        moments: The tokens' sums.
    """

    def __init__(self, moments: Moments) -> None:
        tokens = moments.gram[-1, -1]
        self.mean = moments.gram[-1, :-1] / tokens
        self.mean_difference = moments.mean_difference
        covariance = moments.gram[:-1, :-1] / tokens - torch.outer(self.mean, self.mean)
        variance, square = covariance.diagonal(), moments.gram.diagonal()[:-1] / tokens
        # what float64 sums of float32 numbers leave of a constant feature is below this
        self.scale = torch.where(variance > 1e-12 * square, variance.clamp(min=0).sqrt(), torch.inf)
        values, self.vectors = torch.linalg.eigh(covariance / torch.outer(self.scale, self.scale))
        self.values = values.clamp(min=0)
        crossed = moments.cross[:-1] / tokens - torch.outer(self.mean, self.mean_difference)
        self.crossed = crossed / self.scale[:, None]

    def directions(self, r: int, strength: float) -> torch.Tensor:
        """Orthonormal main directions of the fit to D, (at most r, d): fewer if it has no more."""
        factor = self.vectors.T @ self.crossed / (self.values + strength).sqrt()[:, None]
        energy = factor.T @ factor + torch.outer(self.mean_difference, self.mean_difference)
        values, vectors = torch.linalg.eigh(energy)
        found = values.flip(0)[:r] > 1e-10 * values[-1]
        return vectors.flip(1).T[:r][found]

    def gates(self, z: torch.Tensor, strength: float) -> torch.Tensor:
        """The fit (d + 1, r), bias last, of how much of each direction z (r, d) a token takes."""
        coefficients = torch.linalg.pinv(z)  # (d, r)
        projected = self.vectors.T @ (self.crossed @ coefficients)
        weight = self.vectors @ (projected / (self.values + strength)[:, None]) / self.scale[:, None]
        return torch.cat([weight, (self.mean_difference @ coefficients - self.mean @ weight)[None]])

    def waiting_gates(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates that are open and differ, w (count, d) and b (count,): each reads a main direction of the stream.

        For ranks whose direction is still 0: with equal gates they would get equal gradients and stay one rank.
        """
        values, vectors = self.values.flip(0)[:count], self.vectors.flip(1)[:, :count]
        deviation = torch.where(values > 1e-10 * self.values[-1], 0.5 * values.rsqrt(), 0.0)
        weight = (vectors * deviation / self.scale[:, None]).T
        return weight, 1.0 - weight @ self.mean


def choose_strength(folds: Sequence[Moments], z: torch.Tensor) -> float:
    """The largest of `STRENGTHS` whose held-out error is within one standard error of the smallest.

    Each fold is predicted by the fit to all others; neither takes a look at the tokens again.

    Args:
        folds: Sums over the tokens of disjoint sets of triplets.
        z: Directions (r, d).
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

    Args:
        mean: Of the gates g over tokens, (r,).
        covariance: Likewise, (r, r).
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
    """The edit of rank r by reduced-rank ridge regression, in an open basis.

    Args:
        folds: Sums over the tokens of disjoint sets of triplets, at least one.
        r: Rank. Ranks that the data has nothing for get a direction of 0 and an open gate.
        strength: Ridge strength relative to the features' variance; `None` chooses it by held-out error.
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


def mean_edit(moments: Moments, r: int) -> Edit:
    """The mean difference behind a gate that is open at 1; further ranks have a direction of 0."""
    first = moments.mean_difference[None]
    weight, bias = first[:0], first[:0, 0]
    if r > 1:
        weight, bias = Regression(moments).waiting_gates(r - 1)
    return Edit(
        torch.cat([torch.zeros_like(first), weight]),
        torch.cat([bias.new_ones(1), bias]),
        torch.cat([first, torch.zeros_like(weight)]),
    )


def mean_gates(moments: Moments, z: torch.Tensor) -> Edit:
    """The part of the mean difference that lies in given directions z (r, d), behind gates that are open at 1."""
    scaled = z * (moments.mean_difference @ torch.linalg.pinv(z))[:, None]
    return Edit(torch.zeros_like(scaled), torch.ones_like(scaled[:, 0]), scaled)
