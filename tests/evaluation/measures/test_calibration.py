"""Calibration, and the range of usable strengths, on curves known in advance."""

from __future__ import annotations

import json
import math

import pytest
from helpers.adapters import steered_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets

from peft_psr.evaluation import (
    SteeringScore,
    calibrate_alpha,
    least_alpha,
    measure_side_effects,
    neutral_kl,
    text_perplexity,
    usable_alpha_range,
)


class Curve:
    """A coherence curve of a known shape; trait is 10 alpha."""

    def __init__(self, coherence):
        self.coherence, self.calls = coherence, []

    def __call__(self, alpha):
        self.calls.append(alpha)
        return SteeringScore(alpha, 10 * alpha, self.coherence(alpha), 1)


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("crossing", [0.2, 1.0, 2.7, 11.0])
def test_calibration_finds_the_crossing(crossing):
    curve = Curve(lambda alpha: 95 - 15 * alpha / crossing)
    found = calibrate_alpha(curve, 80.0, tolerance=0.5)
    assert found.why is None and abs(found.coherence - 80) <= 0.5
    assert found.alpha == pytest.approx(crossing, rel=0.05) and found.trait == pytest.approx(10 * found.alpha)
    assert [point.alpha for point in found.curve] == sorted(curve.calls) and len(curve.calls) <= 10


def test_calibration_takes_the_largest_strength_that_meets_the_target():
    dip = Curve(lambda alpha: 70.0 if 0.4 < alpha < 0.6 else 95 - 10 * alpha)
    seen = [dip(alpha) for alpha in (0.5, 1.0, 4.0)]
    assert calibrate_alpha(dip, 80.0, curve=seen).alpha == pytest.approx(1.5, abs=0.15)


def test_calibration_uses_what_was_seen():
    curve = Curve(lambda alpha: 100 - 10 * alpha)
    seen = [curve(alpha) for alpha in (1.0, 2.0, 2.15)]
    curve.calls.clear()
    found = calibrate_alpha(curve, 80.0, curve=seen)
    assert found.alpha == 2.0 and curve.calls == []


def test_calibration_goes_on_where_the_curve_is_flat_near_the_target():
    flat = Curve(lambda alpha: 80.5 if alpha < 1.7 else 20.0)
    found = calibrate_alpha(flat, 80.0, curve=[flat(alpha) for alpha in (0.5, 1.0, 3.0)])
    assert found.why is None and 1.7 / 1.1 <= found.alpha < 1.7


def test_calibration_says_what_it_can_not_do():
    never = calibrate_alpha(Curve(lambda alpha: 60.0), 80.0)
    assert never.alpha is None and never.trait is None and "stays below 80.0" in never.why
    always = calibrate_alpha(Curve(lambda alpha: 99.0), 80.0, max_alpha=4.0)
    assert always.alpha is None and "stays above 80.0 up to alpha 4" in always.why
    cliff = calibrate_alpha(Curve(lambda alpha: 95.0 if alpha < math.e else 10.0), 80.0, max_steps=6)
    assert cliff.alpha < math.e and "15.0 from the target after 6 steps" in cliff.why
    with pytest.raises(ValueError, match="target_coherence must be between 0 and 100, got 120"):
        calibrate_alpha(Curve(lambda alpha: 1.0), 120)
    with pytest.raises(ValueError, match="max_steps must be positive"):
        calibrate_alpha(Curve(lambda alpha: 1.0), 80, max_steps=0)


# ---------------------------------------------------------------- the range of strengths


def test_range_ends_where_coherence_meets_the_floor():
    found = usable_alpha_range(Curve(lambda alpha: 100 - 10 * alpha), 80.0)
    assert found.upper == pytest.approx(2.0, abs=0.15) and found.why is None


def test_range_ends_at_the_first_dip():
    curve = Curve(lambda alpha: 60.0 if 0.7 < alpha < 1.2 else 100 - 10 * alpha)
    seen = [curve(alpha) for alpha in (0.5, 1.0, 1.5, 3.0)]
    found = usable_alpha_range(curve, 80.0, curve=seen)
    assert 0.6 < found.upper <= 0.7
    assert [point.alpha for point in found.curve] == sorted(curve.calls)


def test_range_says_when_it_has_no_end_or_no_start():
    always = usable_alpha_range(Curve(lambda alpha: 99.0), 80.0, max_alpha=4.0)
    assert always.upper == 4.0 and "stays above 80.0 up to alpha 4" in always.why
    never = usable_alpha_range(Curve(lambda alpha: 60.0), 80.0)
    assert never.upper == 0.0 and "stays below 80.0" in never.why


def test_least_alpha_that_reaches_a_trait_score():
    curve = [SteeringScore(alpha, trait, 90.0, 1) for alpha, trait in ((0.5, 40.0), (1.0, 96.0), (2.0, 99.0))]
    assert (
        least_alpha(curve, 96.0) == 1.0 and least_alpha(curve[::-1], 90.0) == 1.0 and least_alpha(curve, 99.5) is None
    )


def test_all_of_it_at_one_strength():
    model, tokenizer = steered_model(), tiny_tokenizer()
    score, neutral = Curve(lambda alpha: 100 - 10 * alpha), Curve(lambda alpha: 70.0)
    reference = SteeringScore(None, 99.0, 97.0, 4)
    curve = [score(alpha) for alpha in (1.0, 2.0, 2.15)]
    result = measure_side_effects(
        model,
        tokenizer,
        2.0,
        score,
        neutral,
        prompted=reference,
        neutral_prompted=reference,
        held_out=triplets(),
        neutral={"yes": triplets(completions=["yes"])},
        texts={"answers": triplets()},
        curve=curve,
    )
    assert score.calls == [1.0, 2.0, 2.15] and neutral.calls == [2.0] and result.usable.upper == 2.0
    assert result.neutral_kl == {"yes": neutral_kl(model, triplets(completions=["yes"]), tokenizer, alpha=2.0)}
    assert result.perplexity == {"answers": text_perplexity(model, triplets(), tokenizer, alpha=2.0)}
    written = json.loads(json.dumps(result.to_json()))
    assert written["steered"]["trait"] == 20.0 and written["neutral_steered"]["coherence"] == 70.0
    assert written["neutral_kl"]["yes"]["steered"] == result.neutral_kl["yes"].steered
