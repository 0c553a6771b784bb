"""Both branches' residual streams at one edited layer after another, each decoder layer computed about once.

The hidden states of all triplets at the current layer are kept, so that stepping on to the next edited layer runs only
the layers between the two. Where they do not fit `KEPT_BYTES`, each look at a layer runs the model from its start.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from peft_psr.base_model.decoder import capture_layer_outputs, decoder_layer_names, text_config
from peft_psr.training.data.collator import Batch, TripletCollator, branch_inputs, to_device
from peft_psr.training.data.dataset import Row

from .branches import few_logits, psr_model, unedited
from .partial import in_eval_mode, known_output, stop_after


logger = logging.getLogger(__name__)

KEPT_BYTES = 4e9
"""Most memory that the kept hidden states may take, beside the model's own; they lie in main memory."""


class Tokens(NamedTuple):
    """Edited tokens of some triplets at one layer."""

    stream: torch.Tensor  # A, the student's stream, (tokens, d) float32
    difference: torch.Tensor  # D, the teacher's stream minus A, (tokens, d) float32
    triplets: torch.Tensor  # the triplet that each token belongs to, (tokens,) int64


@dataclass
class _Position:
    """How far one batch has come: the number of a decoder layer, and its unedited output in either branch."""

    layer: int = -1
    hidden: dict[str, torch.Tensor] = field(default_factory=dict)  # {"teacher": (batch, teacher seq, d), "student": }
    device: torch.device | None = None


class LayerStreams:
    """Steps through a model's decoder layers with all triplets, as encoded rows, at once, `batch_size` a forward pass.

    The student carries the edits of the layers before the one looked at, so these must be final; that layer's own edit
    must do nothing as yet.
    """

    def __init__(self, model: PeftModel, collator: TripletCollator, rows: Sequence[Row], batch_size: int) -> None:
        self.model = model
        self.layers = decoder_layer_names(psr_model(model).model, model.active_peft_config.layers_pattern)
        # alike lengths together, so that little is padded
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["teacher_input_ids"]))
        self._triplets = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        device = next(model.parameters()).device
        self._batches: list[Batch] = [
            to_device(collator([rows[i] for i in triplets]), device) for triplets in self._triplets
        ]
        self._positions = [_Position() for _ in self._batches]
        # layers that read the keys of lower ones can't run without them
        shares = getattr(text_config(model.get_base_model()), "num_kv_shared_layers", 0)
        self._keep: bool | None = False if shares else None  # else known when the first hidden states are there

    def __len__(self) -> int:
        """Batches that one look at a layer yields."""
        return len(self._batches)

    def at(self, name: str) -> Iterator[Tokens]:
        """The edited tokens at the decoder layer `name`, batch by batch; no layer before one that was looked at.

        Raises `ValueError`, naming the layer and the triplet, if activations are not finite.
        """
        layer = self.layers.index(name)
        for number, batch in enumerate(self._batches):
            hidden = self._step(number, layer).hidden
            rows = torch.tensor(self._triplets[number])[batch["steering_mask"].bool().nonzero()[:, 0].cpu()]
            teacher = hidden["teacher"][batch["teacher_mask"].bool().to(hidden["teacher"].device)].float()
            student = hidden["student"][batch["steering_mask"].bool().to(hidden["student"].device)].float()
            for which, values in {"prompted": teacher, "steered": student}.items():
                finite = values.isfinite().all(dim=1).cpu()
                if not finite.all():
                    raise ValueError(
                        f"Activations of the {which} model are not finite at {name!r} on dataset"
                        f"[{rows[~finite][0].item()}]. Load the model in bfloat16 or float32 if it is in float16, "
                        "which ends at 65,504; else leave that triplet out."
                    )
            yield Tokens(student, teacher - student, rows.to(student.device))

    def _step(self, number: int, layer: int) -> _Position:
        """Take a batch on to a layer, if it is not there yet."""
        position = self._positions[number]
        if position.layer == layer:
            return position
        hidden = {
            branch: self._run(number, layer, branch, position.hidden.get(branch)) for branch in ("teacher", "student")
        }
        position = _Position(layer, hidden, hidden["student"].device)
        if self._keep is None:
            self._keep = self._fits(number, hidden)
        if self._keep:
            kept = {branch: tensor.cpu() for branch, tensor in hidden.items()}
            self._positions[number] = _Position(layer, kept, position.device)
        return position

    def _fits(self, number: int, hidden: dict[str, torch.Tensor]) -> bool:
        tokens = [batch["input_ids"].numel() + batch["teacher_input_ids"].numel() for batch in self._batches]
        size = sum(tensor.nbytes for tensor in hidden.values()) / tokens[number] * sum(tokens)
        if size > KEPT_BYTES:
            logger.info(
                "Hidden states of all triplets would take %.1f GB, more than the %.1f GB that may be kept: every look "
                "at a layer runs the model from its start.",
                size / 1e9,
                KEPT_BYTES / 1e9,
            )
        return size <= KEPT_BYTES

    def _run(self, number: int, layer: int, branch: str, known: torch.Tensor | None) -> torch.Tensor:
        """Output of a layer (batch, seq, d), from what is known of an earlier one; "teacher" runs without edits."""
        batch, position = self._batches[number], self._positions[number]
        base = self.model.get_base_model()
        inputs: dict[str, Any] = branch_inputs(batch, branch) | few_logits(self.model)
        if branch == "student":
            inputs |= {"steering_mask": batch["steering_mask"], "alpha": batch["alpha"]}
        before = (
            nullcontext()
            if known is None
            else known_output(base, self.layers[: position.layer + 1], known.to(position.device), edited=False)
        )
        name = self.layers[layer]
        with (
            torch.no_grad(),
            in_eval_mode(self.model),  # dropout would make the branches differ by noise
            unedited(self.model) if branch == "teacher" else nullcontext(),
            before,
            stop_after(base, self.layers[layer + 1 :]),
            capture_layer_outputs(base, [name]) as outputs,
        ):
            self.model(**inputs, use_cache=False)
        return outputs[name]
