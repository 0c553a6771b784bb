"""Attention heads: where their outputs enter the output projection, and what they are there, token by token."""

import re
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_psr.base_model.decoder import decoder_layer_names, text_config
from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.training import TripletCollator
from peft_psr.training.data.collator import branch_inputs, to_device
from peft_psr.training.data.dataset import Row
from peft_psr.training.starts.initialization import fold_of_each


FOLDS = 5
"""Of the triplets; one of them is held out."""

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NOT_SELF = re.compile(r"cross|encdec|encoder|linear", re.IGNORECASE)
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


def output_projections(model: PreTrainedModel) -> list[str]:
    """Names of the output projections of self-attention, in the order of the decoder layers.

    In each layer it is the module called o_proj, out_proj, c_proj, dense or wo inside one whose name says attention.
    Layers without any, as hybrid models have them, are passed over. `ValueError` if no layer has one, or one has
    several.
    """
    found = []
    for layer in decoder_layer_names(model):
        names = [name for name, _ in model.get_submodule(layer).named_modules() if _is_output_projection(name)]
        if len(names) > 1:
            raise ValueError(
                f"ITI needs the one output projection of {layer!r}'s attention, and there are {len(names)} modules "
                f"that it might be: {', '.join(names)}. Leave ITI out for this model."
            )
        found += [f"{layer}.{name}" for name in names]
    if not found:
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if not any(module.children())}
        raise ValueError(
            f"ITI needs the output projections of the attention, and no decoder layer of {type(model).__name__} has a "
            f"module called {', '.join(_OUTPUT_NAMES)} inside its attention. Leave ITI out for this model; its "
            f"modules are called {', '.join(sorted(leaves))}."
        )
    return found


def _is_output_projection(name: str) -> bool:
    *path, last = name.split(".")
    inside = any(_ATTENTION.search(part) for part in path)
    return last in _OUTPUT_NAMES and inside and not any(_NOT_SELF.search(part) for part in path)


class HeadReader:
    """Runs encoded triplets through the model, in eval mode, and reads every head's outputs at the edited tokens.

    `modules` are the names of its output projections; the settings' `on_step` is told of each pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: list[str],
        collator: TripletCollator,
        rows: list[Row],
        settings: FitSettings,
    ) -> None:
        self.model, self.modules, self.collator, self.rows = model, modules, collator, rows
        self.size, self.on_step, self.done = settings.batch_size, settings.on_step, 0
        self.heads = head_count(model)
        self.folds = fold_of_each(rows, FOLDS)

    @torch.no_grad()
    def read(self) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
        """All triplets once, prompted (1) and plain (0).

        Yields:
            Module; class; head outputs, (tokens, heads, head_dim) float32; whether each token is held out, (tokens,).
        """
        device = next(self.model.parameters()).device
        starts = range(0, len(self.rows), self.size)
        for start in starts:
            batch = self.collator(self.rows[start : start + self.size])
            held_out = self.folds[start : start + self.size] == self.folds.max()
            for label, branch, ones in ((1, "teacher", batch["teacher_mask"]), (0, "base", batch["steering_mask"])):
                mask = ones.bool()
                outputs = self._run(branch_inputs(to_device(batch, device), branch), mask)
                tokens = held_out[mask.nonzero()[:, 0]]
                for module in self.modules:
                    if module not in outputs:
                        raise ValueError(
                            f"ITI can't read the heads of {module!r}: the model does not call that module. Load it "
                            "with attn_implementation='eager', or leave ITI out for this model."
                        )
                    yield module, label, self._by_head(module, outputs[module]), tokens
            self.done += 1
            if self.on_step is not None:
                self.on_step(self.done, 2 * len(starts))

    def _run(self, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """What goes into each module at the tokens of `mask`: {module: (tokens, width)}."""
        outputs: dict[str, torch.Tensor] = {}

        def reader(module: str) -> Callable[[nn.Module, tuple], None]:
            def read(_: nn.Module, arguments: tuple) -> None:
                values = arguments[0]
                outputs[module] = values.reshape(*mask.shape, -1)[mask.to(values.device)].float().cpu()

            return read

        handles = [self.model.get_submodule(name).register_forward_pre_hook(reader(name)) for name in self.modules]
        try:
            self.model.base_model(**inputs, use_cache=False)  # without its head
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _by_head(self, module: str, values: torch.Tensor) -> torch.Tensor:
        if values.shape[1] % self.heads:
            raise ValueError(
                f"{module!r} takes {values.shape[1]} features, which {self.heads} attention heads can't share evenly. "
                "Leave ITI out for this model."
            )
        if not values.isfinite().all():
            raise ValueError(
                f"What enters {module!r} is not finite. Load the model in bfloat16 or float32 if it is in float16, "
                "which ends at 65,504."
            )
        return values.view(len(values), self.heads, -1)


def head_count(model: PreTrainedModel) -> int:
    """How many heads, with grouped queries those of the queries, each attention has; `ValueError` if unknown."""
    heads = getattr(text_config(model), "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(
            f"ITI needs the number of attention heads, and the configuration of {type(model).__name__} says "
            f"num_attention_heads={heads!r}. Leave ITI out for this model."
        )
    return heads
