"""`psr evaluate faithfulness`: how near a method comes to the prompt."""

from peft_psr.evaluation.benchmarks.benchmark import Benchmark

from .recipe import FaithfulnessRecipe


FAITHFULNESS = Benchmark(
    "faithfulness",
    "How near methods come to the prompt, with a reworded and a neutral instruction beside them.",
    FaithfulnessRecipe,
    f"{__name__}.benchmark:check_faithfulness",
    f"{__name__}.benchmark:run_faithfulness",
)
