"""`psr show`: which tokens an adapter acts on, and which an instruction moves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

import typer

from .common import (
    ADAPTERS,
    CHAT_TEMPLATE,
    CONFIG,
    DRY_RUN,
    MODEL,
    REVISION,
    TEMPLATE_ARGS,
    TRUST_REMOTE_CODE,
    errors,
    home,
    plain_console,
    quiet_transformers,
    tokenizer_settings,
)


def show(
    adapters: list[str] = ADAPTERS,
    prompt: str = typer.Option(..., "--prompt", "--text", help="The user's turn."),
    answer: str = typer.Option("", help="The answer to look at; by default the model's own, steered by each adapter."),
    instruction: str = typer.Option("", help="Show too what this instruction in the prompt moves on the same tokens."),
    placement: str = typer.Option("system", help="Where the instruction stands: system, before or after."),
    model: str = MODEL,
    revision: str = REVISION,
    chat_template: Path | None = CHAT_TEMPLATE,
    template_args: str = TEMPLATE_ARGS,
    trust_remote_code: bool = TRUST_REMOTE_CODE,
    max_new_tokens: int = typer.Option(128, min=1, help="Longest answer of the model's own, in tokens."),
    output: Path | None = typer.Option(None, callback=home, help="A new HTML file, with every layer's numbers."),
    seed: int = typer.Option(0, min=0, help="Of the model's own answer."),
    dry_run: bool = DRY_RUN,
    config: Path | None = CONFIG,
) -> None:
    """Show how far an adapter's gates are open at each token of a text, and what a prompt moves there."""
    warnings.simplefilter("ignore", FutureWarning)
    from peft_psr.base_model.loading import load_tokenizer
    from peft_psr.evaluation.inspection.shading import shade
    from peft_psr.evaluation.inspection.token_map import map_adapters, token_page
    from peft_psr.files import write_whole
    from peft_psr.hub.steered_model import base_model_of, load_with_adapters
    from peft_psr.serving.chat import check_transcript, name_adapters
    from peft_psr.text import check_unicode
    from peft_psr.training.data.placement import Placement, check_placement

    quiet_transformers()
    console = plain_console()
    with errors(console):
        named = name_adapters(adapters)
        check_transcript(output)
        for option, text in {"--prompt": prompt, "--answer": answer, "--instruction": instruction}.items():
            check_unicode(text, option)
        base = base_model_of(named, model, revision or None)
        settings = tokenizer_settings(named, chat_template, template_args, trust_remote_code)
        place = cast(Placement, placement)
        if instruction:
            check_placement(load_tokenizer(*base, **settings), place)
        if dry_run:
            listed = ", ".join(f"{name} ({where})" for name, where in named.items())
            console.print(f"would show {listed} on {base}")
            return
        steered, processing_class = load_with_adapters(base, named, **settings)
        maps = map_adapters(
            steered, processing_class, prompt, answer, instruction, place, max_new_tokens=max_new_tokens, seed=seed
        )
        digits = console.color_system is None
        for each in maps:
            console.print(f"{each.name}, gates:", style="bold")
            console.print(shade(each.tokens, each.openness().tolist(), digits, console.encoding))
            if instruction:
                console.print(f"{each.name}, what the instruction moves:", style="bold")
                console.print(shade(each.tokens, each.prompt_strength().tolist(), digits, console.encoding))
        meaning = "the higher the digit" if digits else "the darker"
        scale = "; for the instruction by the logarithm, down to a hundredth" if instruction else ""
        console.print(f"{meaning}, the more, relative to the text's strongest token{scale}", style="dim")
        if output is not None:
            write_whole(output, token_page(maps, prompt, instruction, str(base)))
            console.print(f"wrote {output}")
