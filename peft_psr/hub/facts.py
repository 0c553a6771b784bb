"""What is known about an adapter besides its configuration: where it comes from and what was measured on it.

Saved beside the adapter as `psr_facts.json`; the model card is written from it. Nothing is ever filled in by guessing.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from peft_psr._version import __version__
from peft_psr.config import PSRWarning, check_strength
from peft_psr.files import read_json, sha256, write_json


FACTS_NAME = "psr_facts.json"


@dataclass(frozen=True)
class Score:
    """How a model answers, judged.

    Attributes:
        trait: Mean trait score, 0-100.
        coherence: Mean coherence score, 0-100.
        alpha: Strength of the adapter, or `None` where there is none.

    Raises:
        TypeError: a value is not a number.
        ValueError: a score outside 0-100, or a value that is not finite.
    """

    trait: float
    coherence: float
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("trait", "coherence"):
            if not 0 <= check_strength(getattr(self, name), name) <= 100:
                raise ValueError(f"{name} is a score from 0 to 100, got {getattr(self, name)!r}.")
        if self.alpha is not None:
            check_strength(self.alpha, "alpha")


@dataclass(frozen=True)
class Part:
    """One adapter in a combination: its name, its weight, and its trait if known."""

    name: str
    weight: float
    trait: str | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """What a model card says that `adapter_config.json` does not; whatever is left out counts as not known.

    Attributes:
        trait: What the adapter steers towards, in a word or a few.
        instructions: Examples of the instructions that it replaces.
        question: A question to ask in the card's example.
        base_model: The base model in words, where it has no name on the Hub. No path: this is for readers.
        base_model_revision: Commit of the base model that the adapter was trained on.
        template_args: Arguments of the chat template that the adapter was trained with.
        data: Where the prompts and completions come from.
        triplets: How many triplets the adapter was trained on.
        objective: What was minimised, for example "mse", and from which start.
        seed: Seed of the training run.
        versions: {package: version} of that run.
        judge: Who or what gave the scores.
        evaluation: What was scored: which questions, how many answers a number.
        plain: Scores of the base model.
        prompted: Scores of the base model with the instruction in its prompt.
        steered: Scores of the adapter at its calibrated strength.
        calibration: How that strength was chosen.
        curve: Scores at every strength tried, by growing alpha.
        prompt_recovery: At strength 1; 1 is the prompt replaced, 0 nothing done.
        limits: What the adapter is not good for, in sentences.
        license: Licence identifier as the Hub has them, for example "apache-2.0"; it is the author's to give.
        parts: The adapters that this one combines.
        rank_cut: What a rank cut of the combination costs: {layer: RMS of what is missing of the edit relative to the
            RMS of the edit}, on tokens not used for the fit; 0 is exact.

    Raises:
        TypeError: a number is none.
        ValueError: a negative count, or a number that is not finite.
    """

    trait: str | None = None
    instructions: tuple[str, ...] = ()
    question: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    triplets: int | None = None
    objective: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    judge: str | None = None
    evaluation: str | None = None
    plain: Score | None = None
    prompted: Score | None = None
    steered: Score | None = None
    calibration: str | None = None
    curve: tuple[Score, ...] = ()
    prompt_recovery: float | None = None
    limits: tuple[str, ...] = ()
    license: str | None = None
    parts: tuple[Part, ...] = ()
    rank_cut: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.triplets is not None and check_strength(self.triplets, "triplets") < 0:
            raise ValueError(f"triplets counts them, got {self.triplets}.")
        if self.prompt_recovery is not None:
            check_strength(self.prompt_recovery, "prompt_recovery")
        if any(point.alpha is None for point in self.curve):
            raise ValueError("Every score of `curve` needs its strength `alpha`.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterFacts:
        """Facts from what `psr_facts.json` holds; errors as of the class, and `ValueError` for an unknown name."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"No such facts: {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
        given = dict(values)
        for name in ("plain", "prompted", "steered"):
            if given.get(name) is not None:
                given[name] = Score(**given[name])
        for name, kind in (("curve", Score), ("parts", Part)):
            given[name] = tuple(kind(**item) for item in given.get(name, ()))
        for name in ("instructions", "limits"):
            if isinstance(given.get(name, ()), str):
                raise TypeError(f"{name} must be a list of texts, got one text: {given[name]!r}.")
            given[name] = tuple(given.get(name, ()))
        return cls(**given)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> AdapterFacts | None:
        """The facts in an adapter folder, or `None` if it has none.

        Raises:
            ValueError: `psr_facts.json` can't be read as facts, or belongs to other weights.
        """
        path = Path(folder) / FACTS_NAME
        if not path.is_file():
            return None
        try:
            values = read_json(path)
            described = values.pop("weights_sha256", None)
            facts = cls.from_dict(values)
        except (AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold an adapter's facts: {error}") from error
        weights = path.with_name(SAFETENSORS_WEIGHTS_NAME)
        if described is not None and weights.is_file() and described != sha256(weights.read_bytes()):
            raise ValueError(
                f"{path} was written for other weights than those beside it. Write the facts of these, or remove it."
            )
        return facts

    def save(self, folder: str | os.PathLike) -> None:
        """Write what is known as `psr_facts.json` into an adapter folder, bound to the weights there."""
        known: dict[str, Any] = {name: value for name, value in asdict(self).items() if value not in (None, (), {})}
        weights = Path(folder) / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():
            known["weights_sha256"] = sha256(weights.read_bytes())
        write_json(Path(folder) / FACTS_NAME, known, allow_nan=False)


def shared_template_args(facts: Iterable[AdapterFacts | None]) -> dict[str, Any]:
    """The arguments of the chat template that all adapters were trained with of which anything is known.

    Where they were trained with different ones, there are none, with a `PSRWarning`.
    """
    known = [each.template_args for each in facts if each is not None and each != AdapterFacts()]
    if any(args != known[0] for args in known):
        listed = ", ".join(sorted({json.dumps(args, sort_keys=True) for args in known}))
        warnings.warn(
            f"The adapters were trained with different arguments of the chat template ({listed}); none are noted for "
            "their combination. Give them where you use it (--template-args).",
            PSRWarning,
            stacklevel=3,
        )
        return {}
    return known[0] if known else {}


def package_versions() -> dict[str, str]:
    """{package: version} of what trains and runs an adapter."""
    return {"peft-psr": __version__} | {name: version(name) for name in ("peft", "transformers", "torch")}
