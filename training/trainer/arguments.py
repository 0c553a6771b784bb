"""`PSRTrainingArguments`: transformers' arguments with the reported settings as defaults, and PSR's own."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from peft_psr.config import check_strength
from peft_psr.training.objectives.penalties import PENALTIES
from peft_psr.training.objectives.registry import OBJECTIVES
from peft_psr.training.passes.activation_cache import PLACES


def objective_weights(objective: Any) -> dict[str, float]:
    """The objectives that a training looks at, by name or weights by name, as weights; those of 0 are left out.

    Raises:
        TypeError: a weight is not a number.
        ValueError: an unknown objective, a negative weight, or none above 0.
    """
    given: Mapping[str, Any] = objective if isinstance(objective, Mapping) else {str(objective): 1.0}
    if not given:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)} or weights for them; got {objective!r}.")
    for name in given:
        OBJECTIVES.check(name)
    weights = {name: check_strength(weight, f"objective[{name!r}]") for name, weight in given.items()}
    if min(weights.values()) < 0 or max(weights.values()) == 0:
        raise ValueError(f"objective weights must be >= 0 and not all 0, got {weights}.")
    return {name: weight for name, weight in weights.items() if weight}


def learns_from_text(objective: Any) -> bool:
    """Whether a training looks at the answers' text alone, at nothing of the prompted model's pass over them."""
    return all(OBJECTIVES[name].layers == "none" for name in objective_weights(objective))


@dataclass
class PSRTrainingArguments(TrainingArguments):
    """Arguments of `PSRTrainer`.

    Defaults that differ from `TrainingArguments` are those of the reported runs (METHOD 4, agreed on by two or more
    reimplementers): AdamW at 1e-3 with weight decay 1e-6, linear to zero without warm-up, batch 1, shuffle seed 123,
    15 epochs for MSE and 7 for LL (and 15 for KL, which is ours). Gradients are clipped at 1, as ever in transformers;
    what the reported runs did is not known. `report_to` is "none": nothing phones home unless asked to.
    `torch_compile` compiles the decoder layers, one by one.

    Args:
        objective: "mse" (the prompted model's activations), "ll" (the likelihood of its answers), "kl" (its next-token
            distributions), one that was added to `peft_psr.training.objectives.registry.OBJECTIVES`, or weights for a
            sum of them such as `{"mse": 1.0, "kl": 5.0}`.
        normalize_loss: How the MSE, or any objective with a loss at each layer, is scaled. `None`: not at all;
            "global": by its value without any edit, averaged over the training set, so that 1 means "nothing done";
            "layer": each layer by its own such value, then averaged over layers, so that late layers with large norms
            do not dominate.
        regularizer: Weight c of the gate regulariser, >= 0. Reported runs use 0.1 together with
            `normalize_loss="global"` (personas), or neither (IFEval).
        alpha: Strength while training: "trait_score", the judge's score / 100 as a soft label, or a number for all.
        neutral_weight: Weight, >= 0, of neutral triplets: those whose `steered_prompt` equals `prompt`. There the
            prompt changes nothing, so the adapter is to change nothing either. alpha="trait_score" trains them at 1.
        norm_penalty: Weight, >= 0, of the edit's mean squared norm relative to the stream's.
        teacher_cache: Where to keep the frozen model's activations, which are the same in every epoch: "memory",
            "disk" (a file in `output_dir` that goes at the end), "none" to compute them at every step, or "auto":
            in memory if they fit the budget. The result is the same up to rounding.
        teacher_cache_gb: Budget of that cache in GB (1e9 bytes).
        num_train_epochs: `None` for the reported number.

    Raises:
        ValueError: an unknown objective, normaliser or place, a negative weight or budget.
    """

    objective: dict | str | None = field(
        default="mse", metadata={"help": 'An objective\'s name, or weights such as {"mse": 1.0, "kl": 5.0}.'}
    )
    normalize_loss: str | None = field(default=None, metadata={"help": "None, 'global' or 'layer'."})
    regularizer: float = field(default=0.0, metadata={"help": "Weight of the gate regulariser, >= 0."})
    alpha: float | str | None = field(default="trait_score", metadata={"help": "'trait_score' or a number."})
    neutral_weight: float = field(default=1.0, metadata={"help": "Weight of triplets without an instruction, >= 0."})
    norm_penalty: float = field(default=0.0, metadata={"help": "Weight of the edit's relative squared norm, >= 0."})
    teacher_cache: str = field(default="auto", metadata={"help": "'auto', 'memory', 'disk' or 'none'."})
    teacher_cache_gb: float = field(default=4.0, metadata={"help": "Most that the cache may take, in GB."})
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Passes over the triplets; None: the objective's own number, 15 for MSE and KL, 7 for LL."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Triplets a step and device."})
    data_seed: int | None = field(default=123, metadata={"help": "Seed of the shuffling."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where to report, if anywhere."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Triplets have columns of their own."})

    def __post_init__(self) -> None:
        """Check PSR's own arguments and fill in the number of epochs."""
        if isinstance(self.objective, str) and self.objective.startswith("{"):  # as the command line gives it
            self.objective = json.loads(self.objective)
        self.objective_weights = objective_weights(self.objective)
        if self.normalize_loss not in (None, "global", "layer"):
            raise ValueError(f"normalize_loss must be None, 'global' or 'layer', got {self.normalize_loss!r}.")
        for name in ("regularizer", "neutral_weight", "norm_penalty", "teacher_cache_gb"):
            if check_strength(getattr(self, name), name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")
        if self.teacher_cache not in PLACES:
            places = ", ".join(map(repr, PLACES))
            raise ValueError(f"teacher_cache must be one of {places}, got {self.teacher_cache!r}.")
        if isinstance(self.alpha, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", self.alpha):
            self.alpha = float(self.alpha)
        if self.alpha != "trait_score":
            self.alpha = check_strength(self.alpha, "alpha")
        if self.num_train_epochs is None:
            self.num_train_epochs = max(OBJECTIVES[name].epochs for name in self.objective_weights)
        super().__post_init__()

    @property
    def penalty_weights(self) -> dict[str, float]:
        """{penalty: weight}."""
        return {name: getattr(self, name) for name in PENALTIES}


def check_arguments(args: object) -> None:
    """Raise `TypeError` for other arguments than PSR's, whose values can't be told from defaults of theirs."""
    if not isinstance(args, PSRTrainingArguments):
        raise TypeError(
            f"args must be PSRTrainingArguments, got {type(args).__name__}: PSR's own settings (objective, alpha, ...)"
            " are missing there, and its defaults, such as learning_rate, are others. Give what you set to "
            "PSRTrainingArguments(...)."
        )
