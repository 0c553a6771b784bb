"""`psr show`: which tokens an adapter acts on, and which an instruction moves."""

from typing import cast

from pydantic import Field

from peft_psr.training.runs.recipe_fields import Count

from .common import errors, plain_console, quiet_transformers
from .options import Folder, Seed, SteeredOptions, command


class ShowOptions(SteeredOptions):
    """What `psr show` takes."""

    prompt: str = Field(json_schema_extra={"flags": ["--prompt", "--text"]}, description="The user's turn.")
    answer: str = Field("", description="The answer to look at; by default the model's own, steered by each adapter.")
    instruction: str = Field("", description="Show too what this instruction in the prompt moves on the same tokens.")
    placement: str = Field("system", description="Where the instruction stands: system, before or after.")
    max_new_tokens: Count = Field(128, description="Longest answer of the model's own, in tokens.")
    output: Folder | None = Field(None, description="A new HTML file, with every layer's numbers.")
    seed: Seed = Field(0, description="Of the model's own answer.")


@command(ShowOptions)
def show(options: ShowOptions) -> None:
    """Show how far an adapter's gates are open at each token of a text, and what a prompt moves there."""
    quiet_transformers()
    from peft_psr.base_model.loading import load_tokenizer
    from peft_psr.evaluation.inspection.shading import shade
    from peft_psr.evaluation.inspection.token_map import map_adapters, token_page
    from peft_psr.files import write_whole
    from peft_psr.hub.steered_model import base_model_of, load_with_adapters
    from peft_psr.serving.chat import check_transcript, name_adapters
    from peft_psr.text import check_unicode
    from peft_psr.training.data.placement import Placement, check_placement

    console, output = plain_console(), options.output
    prompt, answer, instruction = options.prompt, options.answer, options.instruction
    with errors(console):
        named = name_adapters(options.adapters)
        check_transcript(output)
        for option, text in {"--prompt": prompt, "--answer": answer, "--instruction": instruction}.items():
            check_unicode(text, option)
        base = base_model_of(named, options.model, options.revision or None)
        settings = options.tokenizer_settings_for(named)
        place = cast(Placement, options.placement)
        if instruction:
            check_placement(load_tokenizer(*base, **settings), place)
        if options.dry_run:
            listed = ", ".join(f"{name} ({where})" for name, where in named.items())
            console.print(f"would show {listed} on {base}")
            return
        steered, processing_class = load_with_adapters(base, named, **settings)
        drawing = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
        maps = map_adapters(steered, processing_class, prompt, answer, instruction, place, **drawing)
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
