"""Measuring steering: scores, calibration of alpha, faithfulness to the prompt, side effects, plots, the demo."""

from .calibration import Calibration, calibrate_alpha
from .faithfulness import intervention_strength, prompt_recovery, relative_rmse
from .scoring import SteeringScore, score_model
from .side_effects import (
    NeutralKL,
    SideEffects,
    TextPerplexity,
    UsableRange,
    least_alpha,
    measure_side_effects,
    neutral_kl,
    neutral_triplets,
    text_perplexity,
    text_triplets,
    usable_alpha_range,
)


__all__ = [
    "Calibration",
    "NeutralKL",
    "SideEffects",
    "SteeringScore",
    "TextPerplexity",
    "UsableRange",
    "calibrate_alpha",
    "intervention_strength",
    "least_alpha",
    "measure_side_effects",
    "neutral_kl",
    "neutral_triplets",
    "prompt_recovery",
    "relative_rmse",
    "score_model",
    "text_perplexity",
    "text_triplets",
    "usable_alpha_range",
]
