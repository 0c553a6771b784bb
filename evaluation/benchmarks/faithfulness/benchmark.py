"""`psr evaluate faithfulness`: how near each method comes to the prompt, on held-out completions, without a judge.

For each model, trait, method and seed, and each strength asked for: prompt recovery and relative RMSE by layer, with
the trait's instruction in other words as the yardstick and a neutral instruction as the control. `movement` has the
formulas. Intervals are over prompts: all completions on one prompt are drawn together.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_psr.base_model.decoder import layer_index
from peft_psr.base_model.loading import EMBEDDED
from peft_psr.evaluation.benchmarks.cell import Cell, Result
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.measures.faithfulness import edited_gates, measured_layers
from peft_psr.evaluation.measures.movement import (
    movements,
    neutral_sums,
    squared_errors,
    strengths,
    token_correlations,
)
from peft_psr.evaluation.reports.report import Report
from peft_psr.prompts.conversations import Prompt
from peft_psr.training import PromptPair, Triplet, add_instruction
from peft_psr.training.runs.models import load_tokenizer
from peft_psr.training.sources.registry import check_test_split

from .recipe import EMBEDDED_NEUTRAL_INSTRUCTION, FaithfulnessRecipe
from .report import PLACES, faithfulness_report


def check_faithfulness(bench: Workbench[FaithfulnessRecipe]) -> None:
    """Raises what can be known to be wrong before any long work, as `Workbench.check` and besides.

    `ValueError` if there is no method, no test split, or the neutral instruction is blank or says what a model of few
    words does not know.
    """
    recipe = bench.recipe
    if not bench.method_names():
        raise ValueError("methods: faithfulness measures adapters; name a method, or give adapters.")
    check_test_split(recipe.source)
    if not recipe.control.strip():
        raise ValueError("neutral_instruction is blank; give a text, or leave it out.")
    for model in recipe.models:
        tokenizer = load_tokenizer(model, recipe)
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in tokenizer(recipe.control, add_special_tokens=False)["input_ids"]:
            known = f"; {EMBEDDED_NEUTRAL_INSTRUCTION!r} is one it knows" if model == EMBEDDED else ""
            raise ValueError(f"neutral_instruction: {model} does not know all words of {recipe.control!r}{known}.")
    bench.check()


def run_faithfulness(bench: Workbench[FaithfulnessRecipe]) -> Report:
    """Measures every model, trait, method, seed and strength; raises as `Workbench.fitted` and `held_out`."""
    recipe = bench.recipe
    cells = [
        Cell(model, trait, method, seed, {"alpha": alpha})
        for model in recipe.models
        for trait in bench.traits
        for method in bench.method_names()
        for seed in recipe.seeds
        for alpha in recipe.alphas
    ]
    bench.expect(len(cells))
    return faithfulness_report(recipe, bench.cells(cells, partial(_measure, bench)))


def _measure(bench: Workbench[FaithfulnessRecipe], cell: Cell) -> Result:
    recipe = bench.recipe
    _, processing_class = bench.load(cell.model)
    triplets = bench.held_out(cell.model, cell.trait)
    neutral = [add_instruction(row["prompt"], recipe.control, recipe.placement) for row in triplets]
    reworded = reworded_prompts(triplets, bench.pairs("test")[cell.trait])
    with bench.fitted(cell) as fitted:
        return measure(fitted.model, processing_class, triplets, neutral, reworded, cell.more["alpha"])


def reworded_prompts(triplets: Sequence[Triplet], pairs: Sequence[PromptPair]) -> list[Prompt] | None:
    """For each triplet the same prompt with the next of the trait's instructions; `None` if any prompt has but one."""
    versions: dict[str, list[Prompt]] = {}
    for pair in pairs:
        versions.setdefault(json.dumps(pair.prompt), []).append(pair.steered_prompt)
    found = []
    for triplet in triplets:
        known = versions.get(json.dumps(triplet["prompt"]), [])
        own = [json.dumps(prompt) for prompt in known].index(json.dumps(triplet["steered_prompt"])) if known else 0
        if len(known) < 2:
            return None
        found.append(known[(own + 1) % len(known)])
    return found


def measure(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    neutral: Sequence[Prompt],
    reworded: Sequence[Prompt] | None,
    alpha: float,
) -> dict[str, Any]:
    """Everything of one adapter at one strength, as JSON; see `movement` for the formulas.

    Returns:
        `layers`: their numbers. `prompts`: for each bare prompt, sums over its completions: `kl`, `errors` (by layer),
        `neutral` (by group of tokens: three sums by layer), and `correlations` with one entry a completion. `places`:
        {name: mean strength over layers and completions by token}. `example`: of one completion the tokens, strengths
        by layer and token, and for a PSR adapter `gates`, {layer: gate value by token}.
    """
    prompts: dict[str, dict[str, Any]] = {}
    places: dict[str, np.ndarray] = {}
    counts = np.zeros(PLACES)
    example: dict[str, Any] = {}
    in_response = torch.zeros(0, dtype=torch.bool)
    moved = movements(model, triplets, processing_class, neutral, reworded, alpha)
    for triplet, movement in zip(triplets, moved, strict=True):
        known = prompts.setdefault(json.dumps(triplet["prompt"]), {"kl": {}, "errors": {}, "neutral": {}})
        _add(known["kl"], movement.kl)
        _add(known["errors"], squared_errors(movement))
        _add(known["neutral"], neutral_sums(movement))
        for name, value in token_correlations(movement).items():
            known.setdefault("correlations", {}).setdefault(name, []).extend([] if value is None else [value])
        by_token = strengths(movement)
        shown = (movement.places >= 0) & (movement.places < PLACES)
        at = movement.places[shown].numpy()
        counts[at] += 1
        for name, values in by_token.items():
            places.setdefault(name, np.zeros(PLACES))[at] += values.mean(dim=0)[shown].numpy()
        if not example:
            in_response = movement.places >= 0
            ids = movement.tokens[in_response][:PLACES].tolist()
            cut = {name: values[:, in_response][:, :PLACES].numpy() for name, values in by_token.items()}
            example = {"tokens": [str(processing_class.decode([token])) for token in ids], **cut}
    if gates := edited_gates(model, triplets[0], processing_class, alpha):
        example["gates"] = {str(layer): values[in_response][:PLACES].tolist() for layer, values in gates.items()}
    there = counts > 0
    return {
        "layers": [layer_index(name) for name in measured_layers(model)],
        "prompts": [_rounded(known) for known in prompts.values()],
        "places": {name: _rounded(sums[there] / counts[there]) for name, sums in places.items()},
        "example": _rounded(example),
    }


def _add(sums: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        value = np.asarray(value, dtype=np.float64)
        sums[name] = value if name not in sums else sums[name] + value


def _rounded(data: Any) -> Any:
    """The same as JSON with six digits of each number."""
    if isinstance(data, dict):
        return {name: _rounded(value) for name, value in data.items()}
    if isinstance(data, (list, np.ndarray)) and np.ndim(data) > 0:
        return [_rounded(value) for value in data]
    return data if isinstance(data, str) else float(f"{float(data):.6g}")
