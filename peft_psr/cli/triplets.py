"""`psr triplets`, `psr recipes` and `psr draft`: training data and how to describe it."""

from pathlib import Path

import typer
from pydantic import Field
from rich.console import Console
from rich.table import Table

from peft_psr.training.runs.recipe_fields import Count, Place
from peft_psr.training.runs.triplets.recipe import Recipe, load_recipe
from peft_psr.training.runs.yaml_reading import read_yaml

from .common import errors, plain_console, quiet_transformers, show_progress_of_runs
from .options import ARGUMENT, CommandOptions, Folder, RunOptions, Seed, command, recipe_command


@recipe_command(Recipe, load_recipe)
def triplets(recipe: Recipe, options: RunOptions) -> None:
    """Draw, judge and filter triplets. Stopped at any moment, the same command goes on where it was."""
    show_progress_of_runs()
    from peft_psr.training.runs.triplets.assembly import judge_maker, make_sampler, prompt_pairs
    from peft_psr.training.runs.triplets.estimate import estimate
    from peft_psr.training.runs.triplets.run import MANIFEST, REPORT, TRIPLETS, TripletRun
    from peft_psr.training.sampling.chat_server import ServerError, TooManyFailures

    console, output = plain_console(), options.output
    with errors(console, ServerError, TooManyFailures, ImportError):
        pairs = prompt_pairs(recipe)
        run = TripletRun(output, recipe, pairs, lambda: make_sampler(recipe), judge_maker(recipe, pairs, output))
        run.check()
        if options.dry_run:
            cost = estimate(recipe, pairs)
            about = "" if cost.counted else "about "
            traits = len({pair.trait for pair in pairs})
            console.print(
                f"would draw {cost.completions} completions on {len(pairs)} prompts of {traits} trait(s) "
                f"from {recipe.model} ({recipe.sampler})"
            )
            console.print(
                f"prompts: {about}{cost.prompt_tokens:,} tokens; completions: at most "
                f"{cost.most_completion_tokens:,} tokens"
            )
            if cost.judge_calls:
                console.print(
                    f"judge: {cost.judge_calls:,} questions to {recipe.judge_model} ({recipe.model_judge}), "
                    f"at most about {cost.most_judge_tokens:,} tokens"
                )
            else:
                console.print(f"judge: {recipe.judge}, without a model")
            console.print(f"first prompt: {pairs[0].steered_prompt}")
            console.print(f"and write to {output}/")
            return
        try:
            counts = run.run()
        except KeyboardInterrupt:
            console.print(f"stopped; the same command goes on from what is in {output}/")
            raise typer.Exit(130) from None
        console.print(
            f"kept {counts.kept} of {counts.drawn} completions as triplets in {output / TRIPLETS}"
            + (f", and {counts.negatives} negatives" if counts.negatives else "")
        )
        if counts.dropped:
            console.print(f"dropped: {counts.why()}")
        if missing := counts.planned - counts.judged:
            console.print(f"{missing} draws have failed; the same command tries them again")
        console.print(f"what was drawn, kept and dropped: {output / REPORT}; how it was made: {output / MANIFEST}")


def recipes(
    name: str = typer.Argument("", help="Print this one, to make your own of it: psr recipes embedded > my.yaml"),
) -> None:
    """List the recipes for `psr triplets`, `psr train` and `psr evaluate` that ship, or print one."""
    from peft_psr.evaluation.benchmarks.registry import shipped_by_benchmark
    from peft_psr.training.runs.train.recipe import shipped_train_recipes
    from peft_psr.training.runs.triplets.recipe import shipped_recipes

    kinds = {"psr triplets": shipped_recipes(), "psr train": shipped_train_recipes()}
    kinds |= {f"psr evaluate {benchmark}": found for benchmark, found in shipped_by_benchmark().items()}
    shipped = {title: path for recipes in kinds.values() for title, path in recipes.items()}
    console = plain_console()
    with errors(console):
        if name and name not in shipped:
            raise ValueError(f"No recipe {name!r} ships; there are: {', '.join(shipped)}.")
    if name:
        typer.echo(shipped[name].read_bytes(), nl=False)  # whatever the terminal's encoding: a recipe is UTF-8
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for kind, recipes in kinds.items():
        for title, path in recipes.items():
            table.add_row(kind, title, read_yaml(path)["description"])
    Console(highlight=False).print(table)


class DraftOptions(CommandOptions):
    """What `psr draft` takes."""

    name: str = Field(json_schema_extra=ARGUMENT, description="The trait's name: small letters, digits, - and _.")
    description: str = Field(json_schema_extra=ARGUMENT, description="What the trait is, in a sentence or two.")
    model: Place = Field(description="A chat model: Hub name or folder, or its name on the server.")
    output: Folder = Field(Path("traits"), description="Folder for the trait's files, as `source: personas` reads it.")
    server_url: str = Field("", description="An OpenAI-compatible server, such as http://localhost:8000/v1.")
    key_variable: str = Field("OPENAI_API_KEY", description="Environment variable with the server's key.")
    max_new_tokens: Count = Field(8192, description="Longest answer, in tokens.")
    temperature: float = Field(0.7, ge=0, description="Of the sampling.")
    seed: Seed = Field(0, description="Of the sampling.")


@command(DraftOptions)
def draft(options: DraftOptions) -> None:
    """Draft a new trait's instructions, questions and judge prompt with a chat model, for you to read over."""
    quiet_transformers()
    from peft_psr.text import check_unicode
    from peft_psr.training.runs.drafting import draft_trait, make_chat
    from peft_psr.training.sampling.chat_server import ServerError, TooManyFailures

    console, name, output = plain_console(), options.name, options.output
    with errors(console, ServerError, TooManyFailures):
        if options.dry_run:
            where = options.server_url or "this machine"
            console.print(f"would ask {options.model} at {where} for {name!r} and write to {output}/")
            return
        check_unicode(options.description, "The description")
        server = options.server_url or None, options.key_variable
        chat = make_chat(options.model, *server, options.max_new_tokens, options.temperature, options.seed)
        for path in draft_trait(name, options.description, chat, output).values():
            console.print(f"wrote {path}")
        console.print("a draft: read both files over, correct them, then remove the note in them")
