"""`psr evaluate persona`: trait against coherence."""

from peft_psr.evaluation.benchmarks.benchmark import Benchmark

from .recipe import PersonaRecipe


PERSONA = Benchmark(
    "persona",
    "Trait and coherence on held-out questions, at alpha 1 and at coherence 80 or the prompt's.",
    PersonaRecipe,
    f"{__name__}.benchmark:check_persona",
    f"{__name__}.benchmark:run_persona",
)
