"""Methods, benchmarks and kinds of adapters of one's own: added to a registry, they work like those that ship."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from helpers.commands import psr
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft import IA3Config, get_peft_model
from pydantic import Field
from typer.testing import CliRunner

import peft_psr
from peft_psr import PSRConfig, cli, evaluation
from peft_psr.evaluation import prompt_recovery
from peft_psr.evaluation.benchmarks.benchmark import Benchmark
from peft_psr.evaluation.benchmarks.recipe import EvaluateRecipe, load_evaluate_recipe
from peft_psr.evaluation.benchmarks.registry import BENCHMARKS
from peft_psr.evaluation.benchmarks.run import run_benchmark
from peft_psr.evaluation.measures.adapters.kind import AdapterKind
from peft_psr.evaluation.measures.adapters.registry import ADAPTER_KINDS
from peft_psr.evaluation.measures.strength import at_strength
from peft_psr.evaluation.methods.method import Fitted, Method
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.evaluation.reports.report import Column, Report, Table, Value
from peft_psr.training.passes.branches import psr_model


SMALL = {
    "source": "embedded", "models": "embedded", "judge": "grammar", "traits": "pirate", "methods": "Push",
    "instructions": 1, "questions": 3, "draws": 2, "max_new_tokens": 40, "min_trait_score": 0,
    "min_coherence_score": 0,
}  # fmt: skip


@contextmanager
def added(registry, name, entry):
    registry.add(name, entry)
    try:
        yield entry
    finally:
        registry.remove(name)


# ---------------------------------------------------------------- a method: its function, and a line


def push(model, processing_class, triplets, settings, size):
    """Adds the same number to every feature of one layer."""
    steered = get_peft_model(model, PSRConfig(gate="constant", layers_to_transform=settings.layer))
    (layer,) = psr_model(steered).psr_layers().values()
    with torch.no_grad():
        layer.unit("default").direction.fill_(size)
    return Fitted(steered.eval(), notes={"triplets": len(triplets)})


PUSH = Method("Push", push, "none", "a number", "this test", {"size": 0.5})


def test_a_method_of_ones_own(tmp_path):
    recipe = tmp_path / "small.json"
    options = {"strengths": "1", "calibration_steps": 1, "score_draws": 1}
    recipe.write_text(json.dumps(SMALL | options))
    with added(METHODS, "Push", PUSH):
        done = psr("evaluate", "persona", recipe, "--output", tmp_path / "run")
        listed = CliRunner().invoke(cli.app, ["methods"])
    assert done.exit_code == 0, done.output
    cells = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["cells"]
    assert [cell["method"] for cell in cells] == ["none", "prompt", "Push"] and cells[2]["notes"] == {"triplets": 6}
    assert " ".join(listed.output.splitlines()[-1].split()) == "Push none a number this test"
    gone = psr("evaluate", "persona", recipe, "--output", tmp_path / "run", "--dry-run")
    assert gone.exit_code == 2 and "no method 'Push'" in gone.output


# ---------------------------------------------------------------- a benchmark: recipe, what is measured, report


class NormRecipe(EvaluateRecipe):
    """How far the residual stream's last layer is moved."""

    factor: float = Field(1.0, gt=0, description="What the result is multiplied by.")


def measure_norm(bench, cell):
    if not cell.has_adapter:
        return {"norm": 0.0}
    with bench.fitted(cell) as fitted:
        (layer,) = psr_model(fitted.model).psr_layers().values()
        return {"norm": bench.recipe.factor * layer.unit("default").direction.norm().item()}


def run_norm(bench):
    cells = bench.cells(bench.matrix(), lambda cell: measure_norm(bench, cell))
    rows = {cell.method: {"norm": Value(cell.result["norm"])} for cell in cells}
    table = Table("Norms", (Column("norm", "of the edit"),), rows)
    return Report("Norms", "How long the edits are.", (table,), {"cells": [cell.as_json() for cell in cells]})


NORM = Benchmark("norm", "How long the edits are.", NormRecipe, lambda bench: bench.check(), run_norm)


def test_a_benchmark_of_ones_own(tmp_path):
    recipe = tmp_path / "small.json"
    recipe.write_text(json.dumps(SMALL))
    with added(METHODS, "Push", PUSH), added(BENCHMARKS, "norm", NORM):
        helped = psr("evaluate", "--help")
        done = psr("evaluate", "norm", recipe, "--output", tmp_path / "run", "--factor", "2")
        chosen = load_evaluate_recipe(NormRecipe, recipe, {"factor": 2.0})
        report, files = run_benchmark(NORM, chosen, tmp_path / "run")
    assert "How long the edits are." in helped.output and done.exit_code == 0, done.output
    assert {path.name for path in files} == {"results.json", "table.md", "report.html"}
    assert report.tables[0].rows["Push"]["norm"].mean == pytest.approx(0.5 * 2 * 128**0.5)
    assert len(list((tmp_path / "run" / "cells").iterdir())) == 3
    unknown = psr("evaluate", "norm", recipe, "--output", tmp_path / "run")
    assert unknown.exit_code == 2 and "norm" in unknown.output


# ---------------------------------------------------------------- a kind of adapter


class GatedKind(AdapterKind):
    """IA3, whose strength is a power of its factors: a kind for this test."""

    @contextmanager
    def at_strength(self, model, alpha):
        factors = [parameter for name, parameter in model.named_parameters() if "ia3_l" in name]
        before = [factor.detach().clone() for factor in factors]
        for factor in factors:
            factor.data.pow_(alpha)
        yield
        for factor, its_own in zip(factors, before, strict=True):
            factor.data.copy_(its_own)


def test_a_kind_of_adapter_of_ones_own():
    model = get_peft_model(tiny_model(), IA3Config(target_modules=["v_proj"], feedforward_modules=[])).eval()
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.fill_(3.0)
    tokenizer, rows = tiny_tokenizer(), triplets()
    with pytest.raises(TypeError, match="Only a PEFT model"):
        prompt_recovery(model, rows, tokenizer)
    with added(ADAPTER_KINDS, "IA3", GatedKind()):
        assert prompt_recovery(model, rows, tokenizer, alpha=0.0) == 0.0
        assert prompt_recovery(model, rows, tokenizer, alpha=1.0) != 0.0
        with at_strength(model, 0.0):
            assert all((p == 1).all() for name, p in model.named_parameters() if "ia3_l" in name)


# ---------------------------------------------------------------- listing loads nothing


def test_methods_are_listed_without_what_they_compute_with():
    found = """
import sys, types
from importlib.util import find_spec
from pathlib import Path

for name in ("peft_psr", "peft_psr.evaluation"):  # without what the packages themselves import
    package = types.ModuleType(name)
    package.__path__ = sys.argv[1 + name.count(".")].split(",")
    sys.modules[name] = package
from peft_psr.evaluation.methods.registry import METHODS

assert [METHODS[name].objective for name in METHODS][:1] == ["none"] and METHODS.check("ITI")
print(sorted({"torch", "transformers", "peft", "matplotlib"} & set(sys.modules)))
"""
    folders = [",".join(package.__path__) for package in (peft_psr, evaluation)]
    done = subprocess.run([sys.executable, "-c", found, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
