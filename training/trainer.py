"""`PSRTrainer`: transformers' Trainer on triplets; the frozen model itself, prompted, is the teacher."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from peft_psr.decoder import layer_index
from peft_psr.doors import is_encoder_decoder

from .arguments import PSRTrainingArguments
from .branches import Batch, Branch, layers_downstream, psr_model, run_branch
from .collator import TripletCollator
from .objectives import gate_regularizer, likelihood_loss, mse_by_layer, rows_of, token_weights, triplet_weights
from .triplets import Triplet


logger = logging.getLogger(__name__)


class PSRTrainer(Trainer):
    """Train a PSR adapter to do what the prompt does.

    Everything else is transformers' `Trainer`: devices, checkpoints, callbacks, progress bar. Its logs gain the loss
    of each objective, `mse/layer_<l>` for every layer that the edit can change, `regularizer`, and `live_gates`, the
    share (0-1) of gates that opened at least once since the last log. Gates that did not open in the last two epochs
    are named in a warning when training ends, and kept in `dead_gates`. Under several processes all of these cover
    the triplets of every process.

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
        ValueError: a data set is empty, a triplet can't be used (the message names it), or the process would spread
            the model over several GPUs with `nn.DataParallel`.
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
        if is_encoder_decoder(model.get_base_model()):
            raise ValueError(
                f"{type(model.get_base_model()).__name__} is an encoder-decoder; PSRTrainer trains decoder-only "
                "models, where prompt and completion are one sequence. An adapter on its decoder can be run, though."
            )
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
        if self.args.n_gpu > 1:
            raise ValueError(
                f"This process sees {self.args.n_gpu} GPUs and would copy the model to each (nn.DataParallel), "
                "where PSR can't follow its layers. Start one process a GPU with `accelerate launch`, or let the "
                "process see one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        # the loss is a mean over triplets already, which the Trainer is to divide by its accumulation steps
        self.model_accepts_loss_kwargs = False
        self.layers = layers_downstream(model)
        self.normalizer: dict[str, float] | None = None
        self.dead_gates: list[str] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._live: dict[tuple[str, str], torch.Tensor] = {}
        self._live_in_epoch: dict[tuple[str, str], torch.Tensor] = {}
        self._live_before: dict[tuple[str, str], torch.Tensor] = {}
        self._epoch = 0

    def train(self, *args: Any, **kwargs: Any):
        """Train, then name the gates that are dead."""
        result = super().train(*args, **kwargs)
        recently = {key: live | self._live_before.get(key, live) for key, live in self._live_in_epoch.items()}
        self.dead_gates = [
            f"layer {layer_index(name)}, gate {rank}"
            for (name, _), live in self._in_any_process(recently).items()
            for rank, is_live in enumerate(live.tolist())
            if not is_live
        ]
        if self.dead_gates and self.is_world_process_zero():
            logger.warning(
                "Gates that opened on no token lately: %s. A dead gate gets no gradient and stays dead; "
                "start with `initialize_psr_weights`, or with `PSRConfig(init_weights=True)`.",
                ", ".join(self.dead_gates),
            )
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole adapter from the first process; every process has to call it.

        `Trainer` alone writes no adapter where FSDP keeps its states sharded, which is FSDP2's default.
        """
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _untrained_loss(self) -> dict[str, float]:
        """Mean squared difference of each layer between the two branches without any edit, over the training set."""
        model = self.accelerator.unwrap_model(self.model)
        parts = []
        for batch in self.get_eval_dataloader(self.train_dataset):
            batch = self._prepare_inputs(batch)
            teacher = run_branch(model, batch, self.layers, "teacher")
            base = run_branch(model, batch, self.layers, "base")
            losses = mse_by_layer(base.hidden, teacher.hidden, triplet_weights(batch["steering_mask"]))
            by_triplet = torch.stack([loss.to(self.args.device) for loss in losses.values()], dim=1)
            # from all processes, without the triplets that fill up the last batch
            parts.append(self.accelerator.gather_for_metrics(by_triplet))
        means = torch.cat(parts).mean(dim=0)
        if not means.any():
            raise ValueError(
                "The instruction changes nothing inside the model on any triplet (its activations are equal with and "
                "without it), so the loss can't be normalised and there is nothing to learn."
            )
        return dict(zip(self.layers, means.tolist(), strict=True))

    def _scaled_mse(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        device = self.args.device
        values = {name: loss.to(device) for name, loss in losses.items()}
        if self.normalizer is None:
            return torch.stack(list(values.values())).sum()
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
        if "mse" in weights and self.args.normalize_loss is not None and self.normalizer is None:
            self.normalizer = self._untrained_loss()
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
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._count += 1
        if int(self.state.epoch or 0) != self._epoch:
            self._epoch, self._live_before, self._live_in_epoch = int(self.state.epoch or 0), self._live_in_epoch, {}
        edited = inputs["alpha"][rows_of(inputs["steering_mask"])] != 0
        for key, gates in student.gates.items():
            live = (gates[edited.to(gates.device)] > 0).any(dim=0)
            self._live[key] = live | self._live.get(key, live)
            self._live_in_epoch[key] = live | self._live_in_epoch.get(key, live)

    def _in_any_process(self, live: dict[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
        """Which gates opened on the triplets of at least one process."""
        if not live:
            return {}
        counts = torch.cat([gates.to(self.args.device).float() for gates in live.values()])
        opened = self.accelerator.reduce(counts, "sum") > 0
        return dict(zip(live, opened.split([len(gates) for gates in live.values()]), strict=True))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to a training log; every process has to call it, as `Trainer` does."""
        if "loss" in logs and self._count:
            sums = torch.stack([total.to(self.args.device) for total in self._sums.values()])
            means = self.accelerator.reduce(sums / self._count, "mean")
            logs |= dict(zip(self._sums, means.tolist(), strict=True))
            live = torch.cat(list(self._in_any_process(self._live).values()))
            logs["live_gates"] = live.float().mean().item()
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
