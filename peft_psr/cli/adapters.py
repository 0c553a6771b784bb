"""`psr push` and `psr compose`: saved adapters, uploaded and combined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field
from rich.console import Console

from .common import errors, home, plain_console, quiet_transformers
from .options import ARGUMENT, Adapters, CommandOptions, Folder, command


if TYPE_CHECKING:
    from peft_psr import PSRConfig


class PushOptions(CommandOptions):
    """What `psr push` takes."""

    folder: Folder = Field(json_schema_extra=ARGUMENT, description="An adapter folder: what `save_pretrained` wrote.")
    repo_id: str = Field(
        json_schema_extra=ARGUMENT, description="NAMESPACE/NAME on the Hub, or NAME for your own namespace."
    )
    base_model: str = Field(
        "", description="The base model's name on the Hub, if the adapter was trained on a folder."
    )
    private: bool = Field(False, description="Make a new repository private.")
    update: bool = Field(False, description="Replace the adapter that the repository holds.")


@command(PushOptions)
def push(options: PushOptions) -> None:
    """Upload an adapter to the Hub with a model card; the token is that of `hf auth login` or HF_TOKEN."""
    from peft_psr.hub.push import push_adapter

    console, dry_run = plain_console(), options.dry_run
    with errors(console):
        done = push_adapter(
            options.folder,
            options.repo_id,
            base_model=options.base_model or None,
            private=options.private or None,
            update=options.update,
            dry_run=dry_run,
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


class ComposeOptions(CommandOptions):
    """What `psr compose` takes."""

    adapters: Adapters = Field(json_schema_extra=ARGUMENT, description="Adapter folders, or names on the Hub.")
    weights: str | tuple[float, ...] = Field(
        description='One number for each, such as "1.0,-0.5"; negative steers away.'
    )
    output: Folder = Field(description="A new folder for the combination.")
    base_model: Annotated[str, AfterValidator(home)] = Field(
        "", description="The base model's name, if the adapters name one model in several ways."
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Cut the combination to this rank; needs --triplets."
    )
    triplets: Folder | None = Field(None, description="JSONL of answers to fit the cut to, of all the traits.")


@command(ComposeOptions)
def compose(options: ComposeOptions) -> None:
    """Combine adapters of one base model into a new one: exactly, without loading the model, or cut to a rank."""
    quiet_transformers()
    from peft_psr.files import check_file
    from peft_psr.hub.facts import AdapterFacts
    from peft_psr.hub.saved_adapters import compose_adapters

    console, dry_run, output = plain_console(), options.dry_run, options.output
    adapters, rank, triplets = list(options.adapters), options.rank, options.triplets
    base_model = options.base_model or None
    with errors(console):
        if (rank is None) != (triplets is None):
            raise ValueError("--rank and --triplets go together: a rank is cut by a fit to what the adapters do.")
        if triplets is not None:
            check_file(triplets, "--triplets")
        numbers = _numbers(options.weights)
        combined = compose_adapters(adapters, numbers, output, base_model=base_model, dry_run=True)
        if not dry_run:
            cut = {} if triplets is None else _cut_settings(combined, rank, triplets, adapters, console)
            combined = compose_adapters(adapters, numbers, output, base_model=base_model, **cut)
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


def _numbers(weights: str | Sequence[float]) -> list[float]:
    """The numbers of "1.0,-0.5", or of a YAML list."""
    if not isinstance(weights, str):
        return list(weights)
    try:
        return [float(number) for number in weights.strip("[] ").split(",")]
    except ValueError:
        raise ValueError(f'--weights must be numbers such as "1.0,-0.5", got {weights!r}.') from None
