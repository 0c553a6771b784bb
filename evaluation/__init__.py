"""Measuring steering: scores, calibration of alpha, faithfulness to the prompt, side effects, plots, the demo."""

from typing import TYPE_CHECKING

from peft_psr._lazy import lazily


if TYPE_CHECKING:
    from peft_psr.evaluation.benchmarks.run import (
        evaluate_axbench,
        evaluate_faithfulness,
        evaluate_ifeval,
        evaluate_persona,
        evaluate_side_effects,
    )
    from peft_psr.evaluation.measures.calibration import Calibration, calibrate_alpha
    from peft_psr.evaluation.measures.faithfulness import intervention_strength, prompt_recovery, relative_rmse
    from peft_psr.evaluation.measures.scoring import SteeringScore, score_model
    from peft_psr.evaluation.measures.side_effects import (
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
    from peft_psr.evaluation.measures.strength import at_strength
    from peft_psr.evaluation.reports.report import Report

__getattr__, __dir__ = lazily(
    __name__,
    {
        "peft_psr.evaluation.benchmarks.run": "evaluate_axbench evaluate_faithfulness "
        "evaluate_ifeval evaluate_persona evaluate_side_effects",
        "peft_psr.evaluation.measures.calibration": "Calibration calibrate_alpha",
        "peft_psr.evaluation.measures.faithfulness": "intervention_strength prompt_recovery relative_rmse",
        "peft_psr.evaluation.measures.scoring": "SteeringScore score_model",
        "peft_psr.evaluation.measures.side_effects": "NeutralKL SideEffects TextPerplexity UsableRange least_alpha "
        "measure_side_effects neutral_kl neutral_triplets text_perplexity text_triplets usable_alpha_range",
        "peft_psr.evaluation.measures.strength": "at_strength",
        "peft_psr.evaluation.reports.report": "Report",
    },
)

__all__ = [
    "Calibration",
    "NeutralKL",
    "Report",
    "SideEffects",
    "SteeringScore",
    "TextPerplexity",
    "UsableRange",
    "at_strength",
    "calibrate_alpha",
    "evaluate_axbench",
    "evaluate_faithfulness",
    "evaluate_ifeval",
    "evaluate_persona",
    "evaluate_side_effects",
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
