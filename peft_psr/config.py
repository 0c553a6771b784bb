"""`PSRConfig`: every setting of a PSR adapter that inference needs, saved as `adapter_config.json`."""

import math
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from typing import Any

import torch
from peft import PeftConfig, TaskType


GATES = ("relu", "constant")
POSITIONS = ("response", "question_and_response", "all")


class PSRPeftType(str, Enum):
    """PEFT's `PeftType` enum is closed; this one member stands beside it and behaves like one of its own."""

    PSR = "PSR"


class PSRWarning(UserWarning):
    """What works, but most likely not as meant."""


def check_strength(value: object, name: str) -> float:
    """Return `value` as a float; `TypeError` if it is not a number, `ValueError` if it is not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}); for example {name}=1.0.")
    if not torch.compiler.is_compiling() and not math.isfinite(value):  # while compiling, a number has no value yet
        raise ValueError(f"{name} must be finite, got {value!r}; 0.0 switches the edit off.")
    return float(value)


def _check_choice(value: object, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_layers(layers: int | list[int] | None) -> None:
    if isinstance(layers, list) and not layers:
        raise ValueError("layers_to_transform is an empty list: no layer would be edited. Use None for every layer.")
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(
                f"layers_to_transform must be an int, a list of ints or None, got {layer!r} ({type(layer).__name__})."
            )
        if layer < 0:
            raise ValueError(f"layers_to_transform holds {layer}: layers count from 0 and can't be negative.")


def _setting(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass
class PSRConfig(PeftConfig):
    """Configuration of a Prompt Steering Replacement adapter (arXiv 2605.03907).

    The adapter edits the output `h` of decoder layers, the residual stream, on the tokens that `positions` names:

        gate value  lambda = ReLU(h @ w + b)      (one per token and rank)
        h  <-  h + (alpha + coefficient_bias) * (lambda @ z)

    `task_type` defaults to `"CAUSAL_LM"` unless `target_modules` is given, since what PSR edits is a language model.

    Args:
        r: Rank, the number of (w, b, z) triples a layer. The paper's method is 1.
        gate: `"relu"` for PSR, `"constant"` for a plain steering vector (lambda = 1 on every edited token).
        layers_to_transform: Decoder layers to edit, counted from 0. `None`: every layer (A-PSR); an int: one layer
            (S-PSR); or a list.
        layers_pattern: Name of the `ModuleList` that holds the decoder layers, where structure alone can't tell.
        target_modules: Names of other modules to edit instead of decoder layers, matched as PEFT does.
        exclude_modules: Names of modules to leave alone, matched as PEFT does.
        modules_to_save: Modules besides the adapter that are trained and saved, as in all of PEFT.
        positions: Edited tokens. `"response"`: from the last prompt token, included, to the end;
            `"question_and_response"`: from the last token of the system turn, included; `"all"`: every token.
        alpha: Strength at inference, a finite number; 1.0 is what was trained, 0.0 is no edit
            (with a coefficient_bias of 0).
        coefficient_bias: `b_m`, added to alpha. 0.0 in every run the paper reports.
        init_weights: `True`: a no-op with open gates (w = 0, b = 1, z = 0; of ranks beyond the first w is uniform
            within +-1/sqrt(d), since equal ranks would stay equal). `False`: w, b and z uniform within
            +-1/sqrt(d) as a linear layer would start, which is what the reported runs did.
        freeze_directions: Train the gates alone and leave z, the directions, as they are: for directions that mean
            something by themselves, such as rows of a sparse autoencoder's decoder, which
            `peft_psr.training.initialize_psr_weights(..., directions=...)` sets.

    Raises:
        TypeError: alpha or coefficient_bias is not a number; a layer is not an int; a switch is not a bool.
        ValueError: a value out of range; the message names it and what is accepted.
    """

    r: int = _setting(1, "Rank of the edit; the paper's method is 1.")
    gate: str = _setting("relu", "'relu' (PSR) or 'constant' (a plain steering vector).")
    layers_to_transform: list[int] | int | None = _setting(
        None, "Decoder layers to edit, from 0: None for all, an int for one, or a list."
    )
    layers_pattern: str | list[str] | None = _setting(
        None, "Name of the ModuleList of decoder layers, where structure can't tell."
    )
    target_modules: list[str] | str | None = _setting(
        None, "Modules to edit instead of decoder layers, matched as PEFT does."
    )
    exclude_modules: list[str] | str | None = _setting(None, "Modules to leave alone, matched as PEFT does.")
    modules_to_save: list[str] | None = _setting(None, "Modules besides the adapter that are trained and saved.")
    positions: str = _setting("response", "Edited tokens: 'response', 'question_and_response' or 'all'.")
    alpha: float = _setting(1.0, "Strength of the edit at inference; 0 is no edit.")
    coefficient_bias: float = _setting(0.0, "b_m, added to alpha.")
    init_weights: bool = _setting(
        True, "True: a no-op with open gates. False: start as a linear layer does (the reported runs)."
    )
    freeze_directions: bool = _setting(False, "True: train the gates alone, not the directions z.")

    def __post_init__(self) -> None:
        """Check every value, so that a mistake shows before a model is touched."""
        super().__post_init__()
        self.peft_type = PSRPeftType.PSR
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise TypeError(f"r must be an int, got {self.r!r} ({type(self.r).__name__}).")
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}.")
        starts = "`peft_psr.training.initialize_psr_weights"
        for name, hint in (
            ("init_weights", f"for a start from data see {starts}`"),
            ("freeze_directions", f"the directions themselves go to {starts}(..., directions=...)`"),
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}; {hint}.")
        _check_choice(self.gate, "gate", GATES)
        if self.freeze_directions and self.gate == "constant":
            raise ValueError(
                "gate='constant' has nothing to train but its direction, so freeze_directions=True can't go with it. "
                "Use gate='relu', or leave freeze_directions out."
            )
        _check_choice(self.positions, "positions", POSITIONS)
        if isinstance(self.layers_to_transform, tuple | set | range):
            self.layers_to_transform = sorted(self.layers_to_transform)
        _check_layers(self.layers_to_transform)
        self.alpha = check_strength(self.alpha, "alpha")
        self.coefficient_bias = check_strength(self.coefficient_bias, "coefficient_bias")
        for name in ("target_modules", "exclude_modules"):
            # PEFT holds module names in sets: a list of them would be matched one by one
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))
        if self.task_type is None and self.target_modules is None:
            self.task_type = TaskType.CAUSAL_LM
