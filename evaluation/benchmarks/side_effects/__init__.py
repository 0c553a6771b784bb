"""`psr evaluate side-effects`: what changes besides the trait."""

from peft_psr.evaluation.benchmarks.benchmark import Benchmark

from .recipe import SideEffectsRecipe


SIDE_EFFECTS = Benchmark(
    "side-effects",
    "What changes besides the trait: neutral prompts and texts, refusals, injections, capability.",
    SideEffectsRecipe,
    f"{__name__}.benchmark:check_side_effects",
    f"{__name__}.benchmark:run_side_effects",
)
