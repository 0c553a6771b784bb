"""The benchmarks by name. What they compute with is loaded when they run, not when they are listed.

A benchmark of your own: a folder with its recipe, what it measures and its report, and a line here, or
`BENCHMARKS.add` in your program.
"""

from pathlib import Path
from typing import Any

from peft_psr.registry import Registry

from .benchmark import Benchmark
from .recipe import shipped_evaluate_recipes


BENCHMARKS: Registry[Benchmark[Any]] = Registry(
    "benchmark",
    {
        "persona": f"{__package__}.persona:PERSONA",
        "ifeval": f"{__package__}.ifeval:IFEVAL",
        "axbench": f"{__package__}.axbench:AXBENCH",
        "faithfulness": f"{__package__}.faithfulness:FAITHFULNESS",
        "side-effects": f"{__package__}.side_effects:SIDE_EFFECTS",
    },
)
"""In the order of the command's help."""


def shipped_by_benchmark() -> dict[str, dict[str, Path]]:
    """{benchmark: {recipe: file}} of the recipes that ship; a recipe's name begins with its benchmark's."""
    shipped = shipped_evaluate_recipes()
    return {
        benchmark: {name: path for name, path in shipped.items() if name.startswith(f"{benchmark}-")}
        for benchmark in BENCHMARKS
    }
