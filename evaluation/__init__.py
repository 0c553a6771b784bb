"""Measuring steering: scores, calibration of alpha, faithfulness to the prompt, plots, the demo."""

from .calibration import Calibration, calibrate_alpha
from .faithfulness import intervention_strength, prompt_recovery, relative_rmse
from .scoring import SteeringScore, score_model


__all__ = [
    "Calibration",
    "SteeringScore",
    "calibrate_alpha",
    "intervention_strength",
    "prompt_recovery",
    "relative_rmse",
    "score_model",
]
