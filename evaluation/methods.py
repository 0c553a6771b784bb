"""The methods that the demo compares: which layers, which gate, trained how. Names are the paper's."""

from __future__ import annotations

from dataclasses import dataclass

from peft_psr import PSRConfig


@dataclass(frozen=True)
class Method:
    """One way to make an adapter from triplets.

    Attributes:
        name: As in the paper's tables: S- or A- for a single layer or all, the edit, the objective, the start.
        gate: "relu" or "constant".
        all_layers: Edit every layer rather than one.
        objective: "mse", "ll", or `None` for no training.
        start: What `initialize_psr_weights` does before training, or `None` for the configuration's own start.
    """

    name: str
    gate: str
    all_layers: bool
    objective: str | None
    start: str | None = None

    def config(self, layer: int, positions: str = "response") -> PSRConfig:
        """The adapter's configuration; `layer` is the one that a single-layer method edits."""
        layers = None if self.all_layers else layer
        return PSRConfig(gate=self.gate, layers_to_transform=layers, positions=positions)


METHODS = (
    Method("S-Const DiM", "constant", False, None, "mean_difference"),
    Method("S-Const MSE", "constant", False, "mse"),
    Method("S-PSR MSE", "relu", False, "mse"),
    Method("S-PSR LL", "relu", False, "ll"),
    Method("A-Const MSE", "constant", True, "mse"),
    Method("A-PSR MSE", "relu", True, "mse"),
    Method("A-PSR LL", "relu", True, "ll"),
    Method("A-PSR MSE ridge", "relu", True, "mse", "ridge"),
)
