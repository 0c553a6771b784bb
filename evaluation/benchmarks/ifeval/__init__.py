"""`psr evaluate ifeval`: instructions followed without standing in the prompt."""

from peft_psr.evaluation.benchmarks.benchmark import Benchmark

from .recipe import IFEvalRecipe


IFEVAL = Benchmark(
    "ifeval",
    "Whether IFEval's instructions are followed without standing in the prompt.",
    IFEvalRecipe,
    f"{__name__}.benchmark:check_ifeval",
    f"{__name__}.benchmark:run_ifeval",
)
