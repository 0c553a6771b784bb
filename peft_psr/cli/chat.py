"""`psr chat`: talk to a model with adapters."""

from typing import Annotated

from pydantic import Field
from rich.console import Console

from peft_psr.training.runs.recipe_fields import Count

from .common import errors, quiet_transformers
from .options import Folder, Seed, SteeredOptions, command


class ChatOptions(SteeredOptions):
    """What `psr chat` takes."""

    system: str = Field("", description="Text of a system turn.")
    max_new_tokens: Count = Field(512, description="Longest answer, in tokens.")
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Of the sampling; 0 takes the likeliest token. The model's own settings by default."
    )
    output: Folder | None = Field(None, description="A new JSON file to keep a transcript in.")
    seed: Seed = Field(0, description="Same seed, same conversation, same adapters: same answer.")


@command(ChatOptions)
def chat(options: ChatOptions) -> None:
    """Talk to a model with adapters: choose them, turn them up or down, see their gates. Lines can be piped in."""
    quiet_transformers()
    from peft_psr.hub.steered_model import base_model_of
    from peft_psr.serving import chat as chat_loop
    from peft_psr.serving.chat_session import ChatSession
    from peft_psr.text import check_unicode

    console = Console()
    with errors(console):
        named = chat_loop.name_adapters(options.adapters)
        chat_loop.check_transcript(options.output)
        check_unicode(options.system, "--system")
        base = base_model_of(named, options.model, options.revision or None)
        settings = options.tokenizer_settings_for(named)
        if options.dry_run:
            listed = ", ".join(f"{name} ({where})" for name, where in named.items())
            console.print(f"would talk to {base} with {listed}", soft_wrap=True, highlight=False, markup=False)
            return
        steered, processing_class = chat_loop.load_chat_model(base, named, **settings)
        sampling = options.max_new_tokens, options.temperature, options.seed
        session = ChatSession(steered, processing_class, options.system, *sampling)
        chat_loop.Chat(session, console, options.output).run(chat_loop.read_lines(console))
