"""The sources of prompts by name; a recipe's `source` is one of them. `SOURCES.add("mine", Mine())` adds another."""

from peft_psr.registry import Registry

from .base import Source


SOURCES: Registry[Source] = Registry(
    "source",
    {
        "embedded": "peft_psr.training.sources.embedded:SOURCE",
        "personas": "peft_psr.training.sources.personas:SOURCE",
        "ifeval": "peft_psr.training.sources.ifeval:SOURCE",
        "axbench": "peft_psr.training.sources.axbench:SOURCE",
    },
)


def check_test_split(name: str) -> None:
    """Raises `ValueError`, with the sources that have one, if a source has no test split."""
    if not SOURCES[name].has_test_split:
        others = " or ".join(other for other in SOURCES if SOURCES[other].has_test_split)
        raise ValueError(
            f"source: {name} has no held-out questions to measure on; use {others}. For IFEval and AxBench there are "
            "psr evaluate ifeval and psr evaluate axbench."
        )
