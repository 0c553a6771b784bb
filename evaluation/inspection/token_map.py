"""Which tokens of a text an adapter acts on, and which the instruction moves: numbers and HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_psr import PSRConfig
from peft_psr.base_model.decoder import layer_index
from peft_psr.evaluation.measures.faithfulness import intervention_strength, measured_layers, triplet_batches
from peft_psr.evaluation.reports.pages import render_page
from peft_psr.prompts.conversations import Prompt
from peft_psr.training import Triplet, add_instruction, sample_completions
from peft_psr.training.data.draws import Completion, drawn_triplet
from peft_psr.training.data.placement import Placement

from .shading import openness, relative, token_gates, token_texts, visible


DECADES = 2
"""Powers of ten that colours tell apart in the size of a change."""


@dataclass(frozen=True)
class TokenMap:
    """What one adapter, and an instruction, do at each edited token of a text.

    Attributes:
        name: The adapter's.
        config: Its configuration, with its strength.
        tokens: The edited tokens, the last prompt token among them: what each adds to the text.
        gates: {layer: gate values summed over ranks, (tokens,) float32, 0 or more}, in model order.
        layers: Numbers or names of the decoder layers.
        adapter: (layers, tokens) float32: size of the adapter's change relative to the stream.
        prompt: The same for the instruction, or `None` without one.
    """

    name: str
    config: PSRConfig
    tokens: list[str]
    gates: dict[int | str, torch.Tensor]
    layers: list[int | str]
    adapter: torch.Tensor
    prompt: torch.Tensor | None

    def openness(self) -> torch.Tensor:
        """How far the gates are open at each token, see `shading.openness`."""
        return openness(self.gates)

    def prompt_strength(self) -> torch.Tensor:
        """How strongly the instruction moves each token, mean over layers, on a log scale; (tokens,) between 0 and 1.

        1 is the token that is moved most, 0 one that is moved a hundredth as much or less. `ValueError` without
        instruction.
        """
        if self.prompt is None:
            raise ValueError("There was no instruction whose strength could be told; give one.")
        return _log_scale(self.prompt.mean(dim=0))


def _log_scale(values: torch.Tensor, top: float | None = None) -> torch.Tensor:
    """1 for `top`, by default the largest value, down to 0 for what is `DECADES` powers of ten below it."""
    highest = max(float(values.max()) if top is None else top, 1e-9)
    return (1 + (values / highest).clamp(min=1e-9).log10() / DECADES).clamp(min=0)


def map_adapters(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    question: str,
    answer: str = "",
    instruction: str = "",
    placement: Placement = "system",
    max_new_tokens: int = 128,
    seed: int = 0,
) -> list[TokenMap]:
    """Look at one text through each of a model's adapters, one at a time.

    The question is the user's turn, or plain text that the model goes on from, where it has no chat template. The
    answer is by default the model's own, at most `max_new_tokens` long, steered by the adapter that is looked through.
    What an instruction, placed as `peft_psr.training.add_instruction` has it, moves is told too. `ValueError` if it
    has no place in the prompt, or the text can't be encoded.
    """
    prompt: Prompt = [{"role": "user", "content": question}] if processing_class.chat_template else question
    steered_prompt: Prompt = add_instruction(prompt, instruction, placement)  # type: ignore[arg-type]
    maps = []
    for name in model.peft_config:
        model.set_adapter(name, inference_mode=True)
        said = Completion(answer, truncated=False)
        if not answer:
            (said,) = sample_completions(model, processing_class, [prompt], max_new_tokens, seed=seed)
            if not said.text:
                raise ValueError(f"Steered by {name!r} the model answers nothing. Try another seed or give one.")
        maps.append(map_tokens(model, processing_class, name, drawn_triplet(prompt, steered_prompt, said)))
    return maps


@torch.no_grad()
def map_tokens(
    model: PeftModel, processing_class: PreTrainedTokenizerBase, adapter_name: str, triplet: Triplet
) -> TokenMap:
    """Look at a triplet's prompt and completion through one adapter, which is the only active one afterwards.

    If its steered prompt is another, what that moves is told too. `ValueError` if the triplet can't be encoded.
    """
    model.set_adapter(adapter_name, inference_mode=True)
    config = cast(PSRConfig, model.peft_config[adapter_name])
    (batch,) = triplet_batches(model, [triplet], processing_class, 1, config.alpha)
    edited = batch["steering_mask"][0].bool()
    _, prompt, adapter = intervention_strength(model, triplet, processing_class, config.alpha)
    return TokenMap(
        name=adapter_name,
        config=config,
        tokens=token_texts(processing_class, batch["input_ids"][0][edited].tolist()),
        gates=token_gates(model, batch["input_ids"], batch["steering_mask"], edited, adapter_name),
        layers=[layer_index(name) for name in measured_layers(model)],
        adapter=adapter,
        prompt=None if triplet["prompt"] == triplet["steered_prompt"] else prompt,
    )


def token_page(maps: Sequence[TokenMap], question: str, instruction: str = "", model: str = "") -> str:
    """A page of its own for some adapters: the user's question shaded, and every number by layer and token."""
    return render_page(
        "token_page",
        title=f"Tokens: {', '.join(each.name for each in maps)}",
        model=model,
        question=question,
        instruction=instruction,
        maps=[_for_page(each) for each in maps],
    )


def _for_page(token_map: TokenMap) -> dict[str, object]:
    flows = {"gates": token_map.openness()}
    tables = [
        _grid(
            "Gate values",
            "Colour: share of the layer's widest gate here, which the last line names.",
            token_map.gates,
            {layer: relative(values) for layer, values in token_map.gates.items()},
        ),
    ]
    changes = {"Change by the adapter": token_map.adapter}
    if token_map.prompt is not None:
        changes["Change by the instruction"] = token_map.prompt
        flows["change by the instruction"] = token_map.prompt_strength()
    shown = ["".join(visible(text)) for text in token_map.tokens]
    top = max(float(change.max()) for change in changes.values())
    for title, change in changes.items():
        help_text = (
            f"Size relative to the residual stream; colour: its logarithm, {top / 10**DECADES:.2g} to {top:.2g}."
        )
        values = dict(zip(token_map.layers, change, strict=True))
        tables.append(_grid(title, help_text, values, {layer: _log_scale(row, top) for layer, row in values.items()}))
    return {
        "name": token_map.name,
        "config": token_map.config,
        "flows": {
            name: list(zip(shown, [round(value, 3) for value in values.tolist()], strict=True))
            for name, values in flows.items()
        },
        "tokens": [text if text.strip() else repr(text)[1:-1] or "…" for text in token_map.tokens],
        "tables": tables,
    }


def _grid(
    title: str,
    help_text: str,
    values: Mapping[int | str, torch.Tensor],
    colours: Mapping[int | str, torch.Tensor],
) -> dict[str, object]:
    """Rows of (value, colour 0-1) by token, columns by layer; and the largest value of each layer."""
    cells = [
        [(f"{value:.3g}", round(colour, 3)) for value, colour in zip(row, shades, strict=True)]
        for row, shades in zip(
            torch.stack(list(values.values()), dim=1).tolist(),
            torch.stack(list(colours.values()), dim=1).tolist(),
            strict=True,
        )
    ]
    largest = [f"{float(layer.max()):.2g}" for layer in values.values()]
    return {"title": title, "help": help_text, "layers": list(values), "rows": cells, "largest": largest}
