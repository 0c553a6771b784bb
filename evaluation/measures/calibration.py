"""Finds the strength alpha at which coherence falls to a target: TA@C80, TA@Cp.

Solves coherence(alpha) = target for the largest alpha > 0, where coherence falls on the whole as alpha grows but is
noisy and need not do so everywhere. From points already seen, the last one that meets the target and the first one
beyond it that does not are a bracket; without one, alpha doubles up to `max_alpha`. Bisection then halves the bracket
until coherence is within `tolerance` of the target and the bracket within 10 % of alpha.

Source: arXiv 2605.03907, evaluation of personas.
"""

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
    if not 0 <= target_coherence <= 100:
        raise ValueError(f"target_coherence must be between 0 and 100, got {target_coherence}.")
    for name, value in {"tolerance": tolerance, "max_steps": max_steps, "max_alpha": max_alpha}.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    seen = sorted((point for point in curve if point.alpha), key=_alpha)
    steps = 0

    def measure(alpha: float) -> None:
        nonlocal steps
        steps += 1
        seen.append(score(alpha))
        seen.sort(key=_alpha)

    if not seen:
        measure(1.0)
    while steps < max_steps:
        below, above = _bracket(seen, target_coherence, tolerance)
        # where the curve is flat near the target, a point within tolerance need not be the largest one
        narrow = above is None or below is None or _alpha(above) <= 1.1 * _alpha(below)
        if below is not None and abs(below.coherence - target_coherence) <= tolerance and narrow:
            return Calibration(below.alpha, below.trait, below.coherence, None, seen)
        if above is None:
            if _alpha(seen[-1]) >= max_alpha:
                break
            measure(min(max_alpha, 2 * _alpha(seen[-1])))
        elif below is None and _alpha(above) <= 1e-3:
            break
        else:
            measure((_alpha(below) + _alpha(above)) / 2 if below is not None else _alpha(above) / 2)
    below, above = _bracket(seen, target_coherence, tolerance)
    if above is None and below is not None and abs(below.coherence - target_coherence) > tolerance:
        why: str | None = (
            f"coherence stays above {target_coherence:.1f} up to alpha {_alpha(below):g} ({below.coherence:.1f} there)"
        )
        return Calibration(None, None, None, why, seen)
    if below is None:
        best = max(seen, key=lambda point: point.coherence)
        why = f"coherence stays below {target_coherence:.1f}; at best {best.coherence:.1f}, at alpha {best.alpha:g}"
        return Calibration(None, None, None, why, seen)
    off = abs(below.coherence - target_coherence)
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
