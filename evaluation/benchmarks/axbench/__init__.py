"""`psr evaluate axbench`: concepts brought into answers."""

from peft_psr.evaluation.benchmarks.benchmark import Benchmark

from .recipe import AxBenchRecipe


AXBENCH = Benchmark(
    "axbench",
    "Concepts brought into answers: three ratings 0-2, the factor chosen on half of the instructions.",
    AxBenchRecipe,
    f"{__name__}.benchmark:check_axbench",
    f"{__name__}.benchmark:run_axbench",
)
