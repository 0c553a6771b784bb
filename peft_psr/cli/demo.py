"""`psr demo`: the whole way once, on the embedded model, offline."""

import os
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from rich.console import Console

from .common import errors, home, quiet_transformers
from .options import CommandOptions, Folder, Seed, command


class DemoOptions(CommandOptions):
    """What `psr demo` takes."""

    trait: str = Field("sycophantic", description="A trait of the embedded model, or 'all'.")
    model: Annotated[str, AfterValidator(home)] = Field(
        "", description="Folder of a rebuilt embedded model; the one in the package by default."
    )
    output: Folder = Field(Path("psr_demo"), description="An empty folder for adapter, results and figures.")
    seed: Seed = Field(0, description="Makes the run repeatable on the same machine.")
    quick: bool = Field(False, description="Under a minute of one core: fewer methods and samples, rougher numbers.")


@command(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Train, save, reload and measure PSR adapters on the embedded model, offline."""
    if "huggingface_hub" not in sys.modules:  # which reads it once: the demo needs no network, nor waits for one
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from peft_psr.evaluation.benchmarks.persona.recipe import demo_recipe
    from peft_psr.files import check_new_folder
    from peft_psr.tiny_chat import TRAITS, tiny_chat_path

    trait, model, output, seed = options.trait, options.model, options.output, options.seed
    traits = list(TRAITS) if trait == "all" else [trait]
    console = Console()
    with errors(console):
        recipes = [demo_recipe(name, seed=seed, quick=options.quick) for name in traits]
        check_new_folder(output)
        if model and not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(f"--model {model} is no model folder (it has no config.json).")
        if options.dry_run:
            console.print(f"would train {', '.join(recipes[0].methods)}", markup=False)
            console.print(f"for {', '.join(traits)} with seed {seed}, and write to {output}/", markup=False)
            return
        quiet_transformers()
        from peft_psr.evaluation.demo import run_demo

        run_demo(traits, model or tiny_chat_path(), output, seed, options.quick, console)
