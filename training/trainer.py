"""`PSRTrainer`: transformers' Trainer on triplets; the frozen model itself, prompted, is the teacher."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from peft_psr.decoder import layer_index

from .arguments import PSRTrainingArguments
from .branches import Batch, Branch, layers_downstream, psr_model, run_branch
from .collator import TripletCollator
from .objectives import gate_regularizer, likelihood_loss, mse_by_layer, rows_of, token_weights
from .triplets import Triplet


logger = logging.getLogger(__name__)


class PSRTrainer(Trainer):
    """Train a PSR adapter to do what the prompt does.

    Everything else is transformers' `Trainer`: devices, checkpoints, callbacks, progress bar. Its logs gain the loss
    of each objective, `mse/layer_<l>` for every layer that the edit can change, `regularizer`, and `live_gates`, the
    share (0-1) of gates that opened at least once since the last log. Gates that did not open in the last two epochs
    are named in a warning when training ends, and kept in `dead_gates`.

    Args:
        model: A PEFT model with a PSR adapter, or a plain model together with `peft_config`.
        args: The settings; `None` for the reported ones.
        train_dataset: Triplets: a list, a `datasets.Dataset`, anything with a length and items.
        eval_dataset: Likewise, for the loss on triplets held out.
        processing_class: The tokenizer; `None` loads the one that lies with the model.
        peft_config: A `PSRConfig` to put on a plain model.
        **kwargs: Further arguments of `Trainer`.

    Raises:
        TypeError: the model has no PSR adapter.
        ValueError: a data set is empty, or a triplet can't be used; the message names it.
    """

    args: PSRTrainingArguments

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: PSRTrainingArguments | None = None,
        train_dataset: Sequence[Triplet] | None = None,
        eval_dataset: Sequence[Triplet] | None = None,
        processing_class=None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        psr_model(model)
        assert isinstance(model, PeftModel)  # which psr_model has just checked
        args = PSRTrainingArguments(output_dir="psr_output") if args is None else args
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        collator = TripletCollator(processing_class, model.active_peft_config.positions, cast(str | float, args.alpha))
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=encode_dataset(collator, train_dataset, "train_dataset"),
            eval_dataset=encode_dataset(collator, eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            **kwargs,
        )
        # the loss is a mean over triplets already, which the Trainer is to divide by its accumulation steps
        self.model_accepts_loss_kwargs = False
        self.layers = layers_downstream(model)
        self.normalizer: dict[str, float] | None = None
        self.dead_gates: list[str] = []
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._count = 0
        self._live: dict[tuple[str, str], torch.Tensor] = {}
        self._live_in_epoch: dict[tuple[str, str], torch.Tensor] = {}
        self._live_before: dict[tuple[str, str], torch.Tensor] = {}
        self._epoch = 0

    def train(self, *args: Any, **kwargs: Any):
        """Train, then name the gates that are dead."""
        result = super().train(*args, **kwargs)
        self.dead_gates = _names_of_dead(self._live_before, self._live_in_epoch)
        if self.dead_gates:
            logger.warning(
                "Gates that opened on no token lately: %s. A dead gate gets no gradient and stays dead; "
                "start with `initialize_psr_weights`, or with `PSRConfig(init_weights=True)`.",
                ", ".join(self.dead_gates),
            )
        return result

    def _untrained_loss(self) -> dict[str, float]:
        """Mean squared difference of each layer between the two branches without any edit, over the training set."""
        model = self.accelerator.unwrap_model(self.model)
        totals: dict[str, float] = defaultdict(float)
        batches = 0
        for batch in self.get_eval_dataloader(self.train_dataset):
            batch = self._prepare_inputs(batch)
            teacher = run_branch(model, batch, self.layers, "teacher")
            base = run_branch(model, batch, self.layers, "base")
            losses = mse_by_layer(base.hidden, teacher.hidden, token_weights(batch["steering_mask"]))
            for name, loss in losses.items():
                totals[name] += loss.item()
            batches += 1
        if not any(totals.values()):
            raise ValueError(
                "The instruction changes nothing inside the model on any triplet (its activations are equal with and "
                "without it), so the loss can't be normalised and there is nothing to learn."
            )
        return {name: total / batches for name, total in totals.items()}

    def _scaled_mse(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        device = self.args.device
        values = {name: loss.to(device) for name, loss in losses.items()}
        if self.args.normalize_loss is None:
            return torch.stack(list(values.values())).sum()
        if self.normalizer is None:
            self.normalizer = self._untrained_loss()
        if self.args.normalize_loss == "global":
            return torch.stack(list(values.values())).sum() / sum(self.normalizer.values())
        # a layer where the prompt changes nothing has nothing to say
        scaled = [loss / self.normalizer[name] for name, loss in values.items() if self.normalizer[name] > 0]
        return torch.stack(scaled).mean()

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """The weighted sum of objectives and regulariser on one batch; () float32."""
        weights, unwrapped = self.args.objective_weights, self.accelerator.unwrap_model(model)
        if not self.args.gradient_checkpointing:  # which works in training mode only
            model.eval()  # dropout would make the branches differ by noise
        teacher = run_branch(unwrapped, inputs, self.layers, "teacher") if "mse" in weights else None
        # last, so that what the call left for the layers is still there when checkpoints are computed again
        student = run_branch(unwrapped, inputs, self.layers, "student", logits="ll" in weights, wrapper=model)
        parts: dict[str, torch.Tensor] = {}
        by_layer: dict[str, torch.Tensor] = {}
        if teacher is not None:
            by_layer = mse_by_layer(student.hidden, teacher.hidden, token_weights(inputs["steering_mask"]))
            parts["mse"] = self._scaled_mse(by_layer)
        if "ll" in weights:
            parts["ll"] = likelihood_loss(student.logits, inputs["labels"])  # type: ignore[arg-type]
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        if self.args.regularizer:
            parts["regularizer"] = gate_regularizer(student.gates, inputs["steering_mask"])
            loss = loss + self.args.regularizer * parts["regularizer"]
        if torch.is_grad_enabled():
            self._observe(parts, by_layer, student, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: there is nothing else to predict."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _observe(
        self, parts: dict[str, torch.Tensor], by_layer: dict[str, torch.Tensor], student: Branch, inputs: Batch
    ) -> None:
        """Sum up what the logs will show, without waiting for the device."""
        layers = {f"mse/layer_{layer_index(name)}": loss for name, loss in by_layer.items()}
        for name, value in {**parts, **layers}.items():
            self._sums[name] = self._sums[name] + value.detach()
        self._count += 1
        if int(self.state.epoch or 0) != self._epoch:
            self._epoch, self._live_before, self._live_in_epoch = int(self.state.epoch or 0), self._live_in_epoch, {}
        edited = inputs["alpha"][rows_of(inputs["steering_mask"])] != 0
        for key, gates in student.gates.items():
            live = (gates[edited.to(gates.device)] > 0).any(dim=0)
            self._live[key] = live | self._live.get(key, live)
            self._live_in_epoch[key] = live | self._live_in_epoch.get(key, live)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to a training log."""
        if "loss" in logs and self._count:
            logs |= {name: float(total) / self._count for name, total in self._sums.items()}
            live = [gate for gates in self._live.values() for gate in gates.tolist()]
            logs["live_gates"] = sum(live) / len(live)
            self._sums.clear()
            self._live.clear()
            self._count = 0
        super().log(logs, *args, **kwargs)


def encode_dataset(collator: TripletCollator, dataset: Any, name: str) -> list[dict[str, Any]] | None:
    """Tokenise every triplet once, so that a bad one shows before any long work starts.

    Raises:
        ValueError: the data set is empty, or a triplet can't be used.
    """
    if dataset is None:
        return None
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there are no triplets to work on.")
    return [collator.encode(triplet, f"{name}[{i}]") for i, triplet in enumerate(dataset)]


def _names_of_dead(before: dict[tuple[str, str], torch.Tensor], now: dict[tuple[str, str], torch.Tensor]) -> list[str]:
    """Gates closed on every token of the epoch in progress and of the one before it."""
    return [
        f"layer {layer_index(key[0])}, gate {rank}"
        for key, live in now.items()
        for rank, is_live in enumerate((live | before.get(key, live)).tolist())
        if not is_live
    ]
