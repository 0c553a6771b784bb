"""The `psr` command: thin, one function a subcommand; the work is done elsewhere."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


# before huggingface_hub is imported, which reads it once: the demo needs no network and is not to wait for one
if sys.argv[1:2] == ["demo"]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import typer
    from rich.console import Console

    from . import evaluate as cli_evaluate
    from . import show as cli_show
    from . import train as cli_train
    from . import triplets as cli_triplets
    from .common import (
        ADAPTERS,
        CHAT_TEMPLATE,
        CONFIG,
        DRY_RUN,
        MODEL,
        REVISION,
        TEMPLATE_ARGS,
        TRUST_REMOTE_CODE,
        accept_any_encoding,
        errors,
        home,
        plain_console,
        quiet_transformers,
        tokenizer_settings,
    )
except ImportError as error:  # pragma: no cover - depends on what is installed
    sys.exit(
        f"The psr command needs more than the adapter does ({error.name} is missing): pip install 'peft-psr[eval]'"
    )


if TYPE_CHECKING:
    from peft_psr import PSRConfig


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompt Steering Replacement: replace a steering prompt by a few kilobytes of adapter.",
)


@app.callback()
def _psr() -> None:
    """One subcommand for each step of the way."""


@app.command()
def demo(
    trait: str = typer.Option("sycophantic", help="A trait of the embedded model, or 'all'."),
    model: str = typer.Option(
        "", callback=home, help="Folder of a rebuilt embedded model; the one in the package by default."
    ),
    output: Path = typer.Option(
        Path("psr_demo"), callback=home, help="An empty folder for adapter, results and figures."
    ),
    seed: int = typer.Option(0, min=0, help="Makes the run repeatable on the same machine."),
    quick: bool = typer.Option(
        False, "--quick", help="Under a minute of one core: fewer methods and samples, rougher numbers."
    ),
    dry_run: bool = DRY_RUN,
    config: Path | None = CONFIG,
) -> None:
    """Train, save, reload and measure PSR adapters on the embedded model, offline."""
    warnings.simplefilter("ignore", FutureWarning)
    from peft_psr import tiny_chat_path
    from peft_psr.evaluation.demo import demo_recipe, run_demo
    from peft_psr.files import check_new_folder
    from peft_psr.tiny_chat import TRAITS

    quiet_transformers()
    traits = list(TRAITS) if trait == "all" else [trait]
    console = Console()
    with errors(console):
        recipes = [demo_recipe(name, seed=seed, quick=quick) for name in traits]
        check_new_folder(output)
        if model and not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(f"--model {model} is no model folder (it has no config.json).")
        if dry_run:
            console.print(f"would train {', '.join(recipes[0].methods)}", markup=False)
            console.print(f"for {', '.join(traits)} with seed {seed}, and write to {output}/", markup=False)
            return
        run_demo(traits, model or tiny_chat_path(), output, seed, quick, console)


@app.command()
def push(
    folder: Path = typer.Argument(callback=home, help="An adapter folder: what `save_pretrained` wrote."),
    repo_id: str = typer.Argument(help="NAMESPACE/NAME on the Hub, or NAME for your own namespace."),
    base_model: str = typer.Option(
        "", help="The base model's name on the Hub, if the adapter was trained on a folder."
    ),
    private: bool = typer.Option(False, "--private", help="Make a new repository private."),
    update: bool = typer.Option(False, "--update", help="Replace the adapter that the repository holds."),
    dry_run: bool = DRY_RUN,
    config: Path | None = CONFIG,
) -> None:
    """Upload an adapter to the Hub with a model card; the token is that of `hf auth login` or HF_TOKEN."""
    from peft_psr.hub.push import push_adapter

    console = plain_console()
    with errors(console):
        done = push_adapter(
            folder, repo_id, base_model=base_model or None, private=private or None, update=update, dry_run=dry_run
        )
        verb, where = ("would upload", "would create") if dry_run else ("uploaded", "created")
        if done.creates:
            console.print(f"{where} {done.url}")
        for name, size in done.files.items():
            console.print(f"{verb} {name} ({size} bytes)")
        for name in done.removes:
            console.print(f"{'would remove' if dry_run else 'removed'} {name}, which this adapter does not have")
        if done.commit:
            console.print(f"{done.url}/tree/{done.commit}")


@app.command()
def compose(
    adapters: list[str] = typer.Argument(callback=home, help="Adapter folders, or names on the Hub."),
    weights: str = typer.Option(..., help='One number for each, such as "1.0,-0.5"; negative steers away.'),
    output: Path = typer.Option(..., callback=home, help="A new folder for the combination."),
    base_model: str = typer.Option(
        "", callback=home, help="The base model's name, if the adapters name one model in several ways."
    ),
    rank: int | None = typer.Option(None, min=1, help="Cut the combination to this rank; needs --triplets."),
    triplets: Path | None = typer.Option(
        None, callback=home, help="JSONL of answers to fit the cut to, of all the traits."
    ),
    dry_run: bool = DRY_RUN,
    config: Path | None = CONFIG,
) -> None:
    """Combine adapters of one base model into a new one: exactly, without loading the model, or cut to a rank."""
    from peft_psr.files import check_file
    from peft_psr.hub.facts import AdapterFacts
    from peft_psr.hub.saved_adapters import compose_adapters

    console = plain_console()
    with errors(console):
        if (rank is None) != (triplets is None):
            raise ValueError("--rank and --triplets go together: a rank is cut by a fit to what the adapters do.")
        if triplets is not None:
            check_file(triplets, "--triplets")
        numbers = _numbers(weights)
        combined = compose_adapters(adapters, numbers, output, base_model=base_model or None, dry_run=True)
        if not dry_run:
            cut = {} if triplets is None else _cut_settings(combined, rank, triplets, adapters, console)
            combined = compose_adapters(adapters, numbers, output, base_model=base_model or None, **cut)
        layers = combined.layers_to_transform or combined.target_modules or "all"
        kept = combined.r if rank is None else min(rank, combined.r)
        console.print(f"{'would write' if dry_run else 'wrote'} {output}: rank {kept}, layers {layers}")
        facts = None if dry_run else AdapterFacts.load(output)
        for layer, error in (facts.rank_cut if facts else {}).items():
            console.print(f"layer {layer}: {100 * error:.1f} % of the edit is missing (RMS, held-out tokens)")


def _cut_settings(
    config: PSRConfig, rank: int | None, path: Path, adapters: Sequence[str] = (), console: Console | None = None
) -> dict[str, Any]:
    """What a rank cut takes besides the adapters: the base model, and samples from triplets.

    Triplets that do not say with which arguments of the chat template they were drawn are taken as drawn with those
    that the adapters were trained with.
    """
    from peft_psr.base_model.loading import load_model, load_tokenizer
    from peft_psr.hub.facts import shared_template_args
    from peft_psr.hub.saved_adapters import read_facts
    from peft_psr.training import TripletCollator
    from peft_psr.training.data.by_trait import check_share, drawn_template_args, in_words, scan_traits, usable
    from peft_psr.training.data.context import context_length

    base = config.base_model_name_or_path
    if base is None:
        raise ValueError("The adapters do not say which model they are for; name it with --base-model.")
    found = scan_traits(path)
    args = drawn_template_args(found.traits)
    if args is None:
        args = shared_template_args([read_facts(source) for source in adapters])
    model = load_model(base, config.revision)
    collator = TripletCollator(load_tokenizer(base, config.revision, template_args=args), config.positions, alpha=1.0)
    examples: list[Any] = []
    for trait, triplets in found.traits.items():
        fine, left_out = usable(trait, triplets, found.places[trait], collator, context_length(model.config))
        left_out = [*found.left_out[trait], *left_out]
        check_share(trait, len(fine), left_out)
        if left_out and console is not None:
            console.print(f"{trait}: {len(left_out)} triplets left out. {in_words(left_out)}")
        examples += [triplets[i] for i in fine]
    return {"svd_rank": rank, "model": model, "samples": collator.steering_batches(examples)}


@app.command()
def chat(
    adapters: list[str] = ADAPTERS,
    model: str = MODEL,
    revision: str = REVISION,
    chat_template: Path | None = CHAT_TEMPLATE,
    template_args: str = TEMPLATE_ARGS,
    trust_remote_code: bool = TRUST_REMOTE_CODE,
    system: str = typer.Option("", help="Text of a system turn."),
    max_new_tokens: int = typer.Option(512, min=1, help="Longest answer, in tokens."),
    temperature: float | None = typer.Option(
        None, min=0.0, help="Of the sampling; 0 takes the likeliest token. The model's own settings by default."
    ),
    output: Path | None = typer.Option(None, callback=home, help="A new JSON file to keep a transcript in."),
    seed: int = typer.Option(0, min=0, help="Same seed, same conversation, same adapters: same answer."),
    dry_run: bool = DRY_RUN,
    config: Path | None = CONFIG,
) -> None:
    """Talk to a model with adapters: choose them, turn them up or down, see their gates. Lines can be piped in."""
    warnings.simplefilter("ignore", FutureWarning)
    from peft_psr.hub.steered_model import base_model_of
    from peft_psr.serving import chat as chat_loop
    from peft_psr.serving.chat_session import ChatSession
    from peft_psr.text import check_unicode

    quiet_transformers()
    console = Console()
    with errors(console):
        named = chat_loop.name_adapters(adapters)
        chat_loop.check_transcript(output)
        check_unicode(system, "--system")
        base = base_model_of(named, model, revision or None)
        settings = tokenizer_settings(named, chat_template, template_args, trust_remote_code)
        if dry_run:
            listed = ", ".join(f"{name} ({where})" for name, where in named.items())
            console.print(f"would talk to {base} with {listed}", soft_wrap=True, highlight=False, markup=False)
            return
        steered, processing_class = chat_loop.load_chat_model(base, named, **settings)
        session = ChatSession(steered, processing_class, system, max_new_tokens, temperature, seed)
        chat_loop.Chat(session, console, output).run(chat_loop.read_lines(console))


def _numbers(text: str) -> list[float]:
    """The numbers of "1.0,-0.5", or of a YAML list."""
    try:
        return [float(number) for number in text.strip("[] ").split(",")]
    except ValueError:
        raise ValueError(f'--weights must be numbers such as "1.0,-0.5", got {text!r}.') from None


for command in (
    cli_triplets.triplets, cli_triplets.recipes, cli_triplets.draft, cli_train.train, cli_evaluate.methods,
    cli_show.show,
):  # fmt: skip
    app.command()(command)
app.add_typer(cli_evaluate.evaluate, name="evaluate")


def main() -> None:
    """Entry point of the `psr` command."""
    accept_any_encoding()
    app()
