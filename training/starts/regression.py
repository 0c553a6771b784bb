"""Ridge regressions of one layer's edit on its stream, from sums over tokens: d x d numbers whatever their count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Edit(NamedTuple):
    """Weights of one layer, float64: w (r, d), b (r,), z (r, d)."""

    weight: torch.Tensor
    bias: torch.Tensor
    direction: torch.Tensor


@dataclass
class Moments:
    """Sums over tokens, float64; about 16 d^2 bytes: 0.27 GB at d = 4096."""

    gram: torch.Tensor  # sum of a a^T with a = (A, 1), (d + 1, d + 1); its last entry counts the tokens
    cross: torch.Tensor  # sum of a D^T, (d + 1, d)
    square: torch.Tensor  # sum of |D|^2, ()

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
    """Ridge regressions of D on A over some tokens' sums, for any strength, by one eigendecomposition of d x d.

    Constant features get no weight; collinear ones, and more features than tokens, share it.
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
