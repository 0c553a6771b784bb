"""Every method that the benchmarks compare, by its name in their tables."""

from __future__ import annotations

from .actadd import ACTIVATION_ADDITION
from .iti import INFERENCE_TIME_INTERVENTION
from .lora import LORA_1, LORA_8
from .loreft import LOREFT_LIKELIHOOD, LOREFT_REPS
from .mean_difference import MEAN_DIFFERENCE
from .method import Method
from .psr import psr_method
from .reft_r1 import REFT_R1
from .reps import STEERING_VECTOR_REPS
from .stolfo import PROJECTION


_OURS = "this project"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        MEAN_DIFFERENCE,
        ACTIVATION_ADDITION,
        INFERENCE_TIME_INTERVENTION,
        PROJECTION,
        REFT_R1,
        psr_method("S-Const MSE", "constant", False, "mse"),
        psr_method("S-Const LL", "constant", False, "ll", learning_rate=5e-2),
        STEERING_VECTOR_REPS,
        LOREFT_LIKELIHOOD,
        LOREFT_REPS,
        psr_method("S-PSR MSE", "relu", False, "mse"),
        psr_method("S-PSR LL", "relu", False, "ll"),
        psr_method("S-PSR KL r=8", "relu", False, "kl", r=8, source=_OURS),
        psr_method("A-Const MSE", "constant", True, "mse"),
        psr_method("A-PSR MSE", "relu", True, "mse"),
        psr_method("A-PSR LL", "relu", True, "ll"),
        psr_method("A-PSR MSE ridge", "relu", True, "mse", "ridge", source=_OURS),
        psr_method("A-PSR KL", "relu", True, "kl", source=_OURS),
        psr_method("A-PSR KL r=8", "relu", True, "kl", r=8, source=_OURS),
        LORA_1,
        LORA_8,
    )
}
"""{name: method}."""

DEMO = (
    "S-Const DiM", "S-Const MSE", "S-PSR MSE", "S-PSR LL", "A-Const MSE", "A-PSR MSE", "A-PSR LL", "A-PSR MSE ridge",
)  # fmt: skip
"""Those that `psr demo` compares."""


def chosen(names: tuple[str, ...]) -> list[Method]:
    """The methods of these names.

    Raises:
        ValueError: there is none of a name.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"methods: there is no {', '.join(map(repr, unknown))}; there are: {', '.join(METHODS)}.")
    return [METHODS[name] for name in names]
