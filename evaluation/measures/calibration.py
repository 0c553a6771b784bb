"""Finds the strength alpha at which coherence falls to a target: TA@C80, TA@Cp.

Solves coherence(alpha) = target for the largest alpha > 0, where coherence falls on the whole as alpha grows but is
noisy and need not do so everywhere. From points already seen, the last one that meets the target and the first one
beyond it that does not are a bracket; without one, alpha doubles up to `max_alpha`. Bisection then halves the bracket
until coherence is within `tolerance` of the target and the bracket within 10 % of alpha.

Source: arXiv 2605.03907, evaluation of personas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .scoring import SteeringScore


@dataclass(frozen=True)
class Calibration:
    """What a search for alpha found.

    Attributes:
        alpha: The strength, or `None` if the target can't be reached.
        trait: Mean trait score there, 0-100: TA@C80 where the target was 80.
        coherence: Mean coherence there, 0-100.
        why: What stands in the way of an exact answer; `None` if nothing does.
        curve: All that was seen, by growing alpha.
    """

    alpha: float | None
    trait: float | None
    coherence: float | None
    why: str | None
    curve: list[SteeringScore]


def calibrate_alpha(
    score: Callable[[float], SteeringScore],
    target_coherence: float = 80.0,
    tolerance: float = 1.0,
    max_steps: int = 10,
    max_alpha: float = 32.0,
    curve: Sequence[SteeringScore] = (),
) -> Calibration:
    """Search the largest strength whose coherence is the target.

    Args:
        score: Measures the model at a strength; called at most `max_steps` times.
        target_coherence: 0-100.
        tolerance: How far coherence may be from the target, in points.
        max_steps: Cap on calls of `score`.
        max_alpha: Largest strength tried.
        curve: Measurements already made; they cost nothing more.

    Returns:
        The strength with its scores. If coherence is below the target everywhere, or above it up to `max_alpha`,
        alpha, trait and coherence are `None` and `why` says so. If the steps ran out first, they belong to the best
        strength that meets the target and `why` says how far off it is.

    Raises:
        ValueError: a target outside 0-100, a tolerance or a cap that is not positive.
    """
    (found,) = calibrate_alphas(
        lambda alphas: [score(alpha) for alpha in alphas], [target_coherence], tolerance, max_steps, max_alpha, curve
    )
    return found


def calibrate_alphas(
    score: Callable[[Sequence[float]], Sequence[SteeringScore]],
    targets: Sequence[float],
    tolerance: float = 1.0,
    max_steps: int = 10,
    max_alpha: float = 32.0,
    curve: Sequence[SteeringScore] = (),
) -> list[Calibration]:
    """`calibrate_alpha` for several targets at once: what one search has measured, the others see.

    `score` measures the model at several strengths together, one a target that is still looked for; `max_steps` caps
    the strengths measured for each target. One result a target, all with the same curve. Raises as `calibrate_alpha`.
    """
    for target in targets:
        if not 0 <= target <= 100:
            raise ValueError(f"target_coherence must be between 0 and 100, got {target}.")
    for name, value in {"tolerance": tolerance, "max_steps": max_steps, "max_alpha": max_alpha}.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    seen = {point.alpha: point for point in curve if point.alpha}
    steps = dict.fromkeys(targets, 0)
    while True:
        points = sorted(seen.values(), key=_alpha)
        found = {target: _next_alpha(points, target, tolerance, max_alpha) for target in targets}
        wanted = {target: alpha for target, alpha in found.items() if alpha is not None and steps[target] < max_steps}
        if not wanted:
            return [_calibration(points, target, tolerance, steps[target]) for target in targets]
        for target in wanted:
            steps[target] += 1
        alphas = list(dict.fromkeys(wanted.values()))
        seen |= zip(alphas, score(alphas), strict=True)


def _next_alpha(seen: Sequence[SteeringScore], target: float, tolerance: float, max_alpha: float) -> float | None:
    """The strength to measure next, or `None` where no further one helps."""
    if not seen:
        return 1.0
    below, above = _bracket(seen, target, tolerance)
    # where the curve is flat near the target, a point within tolerance need not be the largest one
    narrow = above is None or below is None or _alpha(above) <= 1.1 * _alpha(below)
    if below is not None and abs(below.coherence - target) <= tolerance and narrow:
        return None
    if above is None:
        return None if _alpha(seen[-1]) >= max_alpha else min(max_alpha, 2 * _alpha(seen[-1]))
    if below is None:
        return None if _alpha(above) <= 1e-3 else _alpha(above) / 2
    return (_alpha(below) + _alpha(above)) / 2


def _calibration(seen: list[SteeringScore], target: float, tolerance: float, steps: int) -> Calibration:
    below, above = _bracket(seen, target, tolerance)
    if above is None and below is not None and abs(below.coherence - target) > tolerance:
        why: str | None = (
            f"coherence stays above {target:.1f} up to alpha {_alpha(below):g} ({below.coherence:.1f} there)"
        )
        return Calibration(None, None, None, why, seen)
    if below is None:
        best = max(seen, key=lambda point: point.coherence)
        why = f"coherence stays below {target:.1f}; at best {best.coherence:.1f}, at alpha {best.alpha:g}"
        return Calibration(None, None, None, why, seen)
    off = abs(below.coherence - target)
    why = None if off <= tolerance else f"coherence is {off:.1f} from the target after {steps} steps"
    return Calibration(below.alpha, below.trait, below.coherence, why, seen)


def _alpha(point: SteeringScore) -> float:
    assert point.alpha is not None
    return point.alpha


def _bracket(
    seen: Sequence[SteeringScore], target: float, tolerance: float
) -> tuple[SteeringScore | None, SteeringScore | None]:
    """The last point that meets the target within tolerance, and the first one beyond it."""
    last = max((i for i, point in enumerate(seen) if point.coherence >= target - tolerance), default=-1)
    return (seen[last] if last >= 0 else None), (seen[last + 1] if last + 1 < len(seen) else None)
