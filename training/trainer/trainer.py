"""`PSRTrainer`: transformers' Trainer on triplets; the frozen model itself, prompted, is the teacher."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from peft import PeftConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from peft_psr.base_model.loading import tokenizer_of
from peft_psr.training.data.collator import Batch, TripletCollator
from peft_psr.training.data.context import check_rows
from peft_psr.training.data.dataset import encode_datasets
from peft_psr.training.data.triplets import Triplet
from peft_psr.training.objectives.losses import Losses, losses_of, not_finite
from peft_psr.training.objectives.normalizer import untrained_loss
from peft_psr.training.objectives.objective import Objective, Passes, layers_looked_at
from peft_psr.training.objectives.registry import OBJECTIVES
from peft_psr.training.objectives.tokens import rows_of
from peft_psr.training.passes.activation_cache import CacheSettings
from peft_psr.training.passes.branches import Branch, config_of, layers_downstream, psr_model, run_branch
from peft_psr.training.passes.compiled import compiled_layers
from peft_psr.training.passes.frozen import FrozenModel

from .arguments import PSRTrainingArguments, check_arguments
from .checks import check_adapters, check_decoder_only, check_directions, check_one_gpu, check_whole_layers
from .length_grouping import LengthGroupedSampler
from .several import clip_each, in_turn, load_adapters
from .summary import GateKey, GateRecord, Means, TrainingSummary, peak_memory, sum_up


logger = logging.getLogger(__name__)


class PSRTrainer(Trainer):
    """Train a PSR adapter to do what the prompt does, or several adapters at once.

    Everything else is transformers' `Trainer`: devices, checkpoints, callbacks, progress bar. Its logs gain the loss
    of each objective, `mse/layer_<l>` (or another one's) for every layer that the edit can change, `regularizer`,
    `norm_penalty`, and `live_gates`, the share (0-1) of gates that opened at least once since the last log. Gates that
    did not open in the last two epochs are named in a warning when training ends, and kept in `dead_gates`; `summary`
    holds what the run came to. Under several processes all of these cover the triplets of every process.

    Several adapters: the loss is the sum of theirs, gradients are clipped for each by itself, and a batch of n holds n
    triplets of each, so that each comes out as it would alone (with the same number of triplets and no grouping by
    length: in the same order, hence equal up to rounding). They share the frozen model's passes.

    A loss that is not finite ends the training with the step, the layer and the triplet.

    Args:
        model: A PEFT model with a PSR adapter, or a plain model together with `peft_config`.
        args: The settings; `None` for the reported ones.
        train_dataset: Triplets: a list, a `datasets.Dataset`, anything with a length and items. Or {adapter: triplets}
            for all the adapters of `model` that are to be trained; they have to edit the same layers with the same `r`
            and gate.
        eval_dataset: Likewise, for the loss on triplets held out.
        processing_class: The tokenizer; `None` loads the one that lies with the model.
        peft_config: A `PSRConfig` to put on a plain model.
        **kwargs: Further arguments of `Trainer`.

    Raises:
        TypeError: the model has no PSR adapter, or `args` are not PSR's.
        ValueError: a data set is empty, a triplet can't be used (the message names it), adapters can't be trained
            together, or the process would spread the model over several GPUs with `nn.DataParallel`.
        FloatingPointError: from `train` and `evaluate`, a loss is infinite or not a number.
    """

    args: PSRTrainingArguments

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: PSRTrainingArguments | None = None,
        train_dataset: Sequence[Triplet] | Mapping[str, Sequence[Triplet]] | None = None,
        eval_dataset: Sequence[Triplet] | Mapping[str, Sequence[Triplet]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        tuner = psr_model(model)
        assert isinstance(model, PeftModel)  # which psr_model has just checked
        check_decoder_only(model.get_base_model())
        args = PSRTrainingArguments(output_dir="psr_output") if args is None else args
        check_arguments(args)
        if processing_class is None:
            processing_class = tokenizer_of(model)
        self.several = isinstance(train_dataset, Mapping)
        self.adapters = (
            [str(name) for name in cast(Mapping, train_dataset)] if self.several else [model.active_adapter]
        )
        if self.several:
            check_adapters(tuner, self.adapters, args)
        check_directions(tuner, self.adapters)
        collators = {
            name: TripletCollator(processing_class, config_of(model, name).positions, cast(str | float, args.alpha))
            for name in self.adapters
        }
        self._collators = collators
        rows = {
            name: None if data is None else encode_datasets(collators, data, name)
            for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
        }
        self._rows = [row for of_set in rows.values() for row in of_set or ()]
        check_rows(self._rows, model)
        for index, row in enumerate(self._rows):
            row["index"] = index
        items: dict[str, Any] = {
            name: in_turn(of_set) if self.several and of_set else of_set for name, of_set in rows.items()
        }
        super().__init__(
            model=model,
            args=args,
            data_collator=cast(Any, collators[self.adapters[0]]),
            processing_class=processing_class,
            **items,
            **kwargs,
        )
        check_one_gpu(self.args)
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # not as a whole: `train` compiles the layers
        # the loss is a mean over triplets already, which the Trainer is to divide by its accumulation steps
        self.model_accepts_loss_kwargs = False
        self._active_before = model.active_adapter
        self._activate()
        self.layers = layers_downstream(model)
        self._deactivate()
        if self.args.norm_penalty:
            check_whole_layers(tuner, self.adapters, self.layers)
        weights = self.args.objective_weights
        self.objectives: dict[str, Objective] = {name: OBJECTIVES[name] for name in OBJECTIVES if name in weights}
        self.normalizers: dict[str, dict[str, torch.Tensor]] = {}
        self.dead_gates: list[str] = []
        self.summary: TrainingSummary | None = None
        self._frozen: FrozenModel | None = None
        self._held_out = torch.zeros(2, len(self.adapters))  # sums of losses and numbers of triplets
        self._step: tuple[torch.Tensor, int] | None = None  # triplets of each adapter, batches, of all processes
        self._since_log, self._in_epoch, self._epoch = Means(), Means(), 0
        self._gates = GateRecord(self.adapters)

    @property
    def _peft_model(self) -> PeftModel:
        return cast(PeftModel, self.model)

    def _activate(self) -> None:
        """All adapters that are trained get gradients."""
        if self.several:
            psr_model(self._peft_model).set_adapter(self.adapters)

    def _deactivate(self) -> None:
        """Only the adapter that was active before is, so that `generate` has one edit at work."""
        if self.several:
            self._peft_model.set_adapter(self._active_before)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; then sum up, and name the gates that are dead."""
        begin = time.perf_counter()
        self._activate()
        self._frozen, self.normalizers = None, {}  # the base model may have been changed since
        self._since_log, self._in_epoch, self._epoch = Means(), Means(), 0
        self._gates, self._step = GateRecord(self.adapters), None
        try:
            with compiled_layers(self._peft_model, self.args):
                result = super().train(*args, **kwargs)
        finally:
            self._step = None
            self._deactivate()
        names, means = self._in_epoch.take(self.args.device)
        if names:
            means = self.accelerator.reduce(means, "mean")
        counts = self._over_processes(self._gates.last_two_epochs())
        self.dead_gates = self._gates.names_of_dead(counts)
        self.summary = sum_up(
            dict(zip(names, means.tolist(), strict=True)),
            counts,
            self._over_processes(self._gates.last_epoch()),
            steps=self.state.global_step,
            seconds=time.perf_counter() - begin,
            peak_memory_bytes=peak_memory(self.args.device),
            teacher_cache="none" if self._frozen is None else self._frozen.place,
            dead_gates=self.dead_gates,
        )
        self._frozen = None
        if self.dead_gates and self.is_world_process_zero():
            logger.warning(
                "Gates that opened on no token lately: %s. A dead gate gets no gradient and stays dead; "
                "start with `initialize_psr_weights`, or with `PSRConfig(init_weights=True)`.",
                ", ".join(self.dead_gates),
            )
        return result

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss; of several adapters, `eval_dataset` is {adapter: triplets} as in the constructor."""
        if self.several and (isinstance(eval_dataset, Mapping) or (eval_dataset and "rows" not in eval_dataset[0])):
            eval_dataset = in_turn(encode_datasets(self._collators, eval_dataset, "eval_dataset"))
        elif isinstance(eval_dataset, list) and eval_dataset is not self.train_dataset:
            # rows of another trainer's data set would be taken for this one's
            eval_dataset = [{key: value for key, value in row.items() if key != "index"} for row in eval_dataset]
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            if not self.is_in_train:
                self._frozen = None  # the base model may be changed before the next call

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Of several adapters also each one's loss, and their sum in place of a mean over batches."""
        self._held_out = torch.zeros(2, len(self.adapters), device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        if self.several:
            name = f"{kwargs['metric_key_prefix']}_loss"
            losses = dict(zip(self.adapters, (self._held_out[0] / self._held_out[1]).tolist(), strict=True))
            own = {f"{name}/{adapter}": loss for adapter, loss in losses.items()}
            output = output._replace(metrics={**(output.metrics or {}), name: sum(losses.values()), **own})
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; it is over all of their triplets that the loss is to be a mean."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            adapters = torch.cat([batch["adapter"] for batch in batches]).to(self.args.device)
            counts = torch.bincount(adapters, minlength=len(self.adapters))
            self._step = self.accelerator.reduce(counts, "sum"), len(batches) * self.accelerator.num_processes
        return batches, items

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole adapter from the first process; every process has to call it.

        `Trainer` alone writes no adapter where FSDP keeps its states sharded, which is FSDP2's default.
        """
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapters(self._peft_model, self.adapters, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # Trainer's own leaves an adapter of another name than "default" as it was, with no more than a warning
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            load_adapters(self._peft_model, self.adapters, self.state.best_model_checkpoint)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Of several adapters each by itself, as if it were alone."""
        if not self.several:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_each(psr_model(self._peft_model), self.adapters, self.args.max_grad_norm)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler([len(row["input_ids"]) for row in rows], size, self.args.data_seed or 0)

    def _untrained_loss(self, objective: Objective, model: PeftModel) -> dict[str, torch.Tensor]:
        if self.train_dataset is None:
            raise ValueError("normalize_loss is by the loss without any edit on train_dataset, and there is none.")
        batches: Any = map(self._prepare_inputs, self.get_test_dataloader(cast(Any, self.train_dataset)))
        names = self.adapters if self.several else [""]
        # from all processes, without the triplets that fill up the last batch; several adapters have one process
        gather = list if self.several else self.accelerator.gather_for_metrics
        return untrained_loss(objective, self._frozen_model(model), self.layers, batches, names, gather)

    def _frozen_model(self, model: PeftModel) -> FrozenModel:
        if self._frozen is None:
            args, layers = self.args, layers_looked_at(self.objectives.values(), self.layers)
            settings = CacheSettings(args.teacher_cache, args.teacher_cache_gb, Path(args.output_dir or "."))
            again = bool(args.gradient_checkpointing)
            self._frozen = FrozenModel(model, self._rows, self.layers[0], layers, settings, again, self._sharded)
        return self._frozen

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of objectives and penalties on one batch; () float32. Of several adapters, their sum."""
        args, batch = self.args, cast(Batch, inputs)
        passes = self._passes(model, batch)
        losses = losses_of(passes, self.objectives, args.penalty_weights, self.normalizers, args.normalize_loss)
        values = losses.weighted(args.objective_weights | args.penalty_weights, args.device)
        share = self._shares(batch["adapter"], step=torch.is_grad_enabled())
        values = torch.where(batch["neutral"], args.neutral_weight, 1.0) * values
        loss = (share * values).sum()
        if not torch.isfinite(loss):
            index, where = not_finite(losses, passes)
            triplet = self._rows[index]["where"] if index >= 0 else "a triplet of no data set"
            raise FloatingPointError(
                f"Step {self.state.global_step}: {where} not finite on {triplet}. If it is the steered model, a "
                "smaller learning_rate or max_grad_norm may help; if the prompted one, the base model's dtype is too "
                "small for this triplet: load it in bfloat16 or float32."
            )
        if torch.is_grad_enabled():
            self._observe(losses, values, passes.student, batch)
        else:
            self._held_out = self._held_out.to(values.device)
            self._held_out.index_add_(1, batch["adapter"], torch.stack([values, torch.ones_like(values)]))
        return (loss, {"loss": loss}) if return_outputs else loss

    def _passes(self, model: torch.nn.Module, batch: Batch) -> Passes:
        """Both branches on a batch; of the prompted model what is known already."""
        unwrapped = cast(PeftModel, self.accelerator.unwrap_model(model))
        if not self.args.gradient_checkpointing:  # which works in training mode only
            model.eval()  # dropout would make the branches differ by noise
        frozen = self._frozen_model(unwrapped)
        for name, objective in self.objectives.items():
            if objective.layers == "all" and self.args.normalize_loss is not None and name not in self.normalizers:
                self.normalizers[name] = self._untrained_loss(objective, unwrapped)
        teacher = frozen.teacher(batch)
        names = [self.adapters[i] for i in batch["adapter"].tolist()] if self.several else None
        # a sharded head can't be called once more before going back, so logits come with the forward call
        with_logits = [one for one in self.objectives.values() if one.needs_logits and self._sharded]
        prompted = None
        if any(objective.layers != "none" for objective in with_logits):
            logits = run_branch(unwrapped, batch, [], "teacher", logits=True).logits
            assert logits is not None
            prompted = logits[batch["teacher_mask"].bool()]
        # last, so that what the call left for the layers is still there when checkpoints are computed again
        with frozen.layers_below_known(batch):
            student = run_branch(
                unwrapped, batch, self.layers, "student", bool(with_logits), wrapper=model, adapter_names=names
            )
        return Passes(unwrapped, batch, self.layers, student, teacher, self.adapters, prompted)

    def _shares(self, adapter: torch.Tensor, step: bool) -> torch.Tensor:
        """Weights (batch,) of triplets: their sum is each adapter's mean, of a step once its batches are averaged."""
        if self._step is None or not step:
            return (1.0 / torch.bincount(adapter, minlength=len(self.adapters)))[adapter]
        counts, batches = self._step
        return batches / counts[adapter]

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or any(isinstance(weight, DTensor) for weight in self._peft_model.parameters())

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss alone: there is nothing else to predict."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _observe(self, losses: Losses, values: torch.Tensor, student: Branch, batch: Batch) -> None:
        """Sum up what the logs will show, without waiting for the device."""
        epoch = int(self.state.epoch or 0)
        if epoch != self._epoch:
            self._epoch, self._in_epoch = epoch, Means()
        share = self._shares(batch["adapter"], step=False)
        layers = {f"{name}/layer_{layer}": loss for name, layer, loss in losses.of_layers()}
        mean = share / share.sum()  # over adapters, too
        means = {
            name: (value.detach().to(mean.device) * mean).sum() for name, value in {**losses.parts, **layers}.items()
        }
        self._since_log.add(means)
        if self.several:
            own = values.new_zeros(len(self.adapters)).index_add(0, batch["adapter"], values.detach() * share)
            there = set(batch["adapter"].tolist())
            means |= {f"loss/{name}": own[i] for i, name in enumerate(self.adapters) if i in there}
        self._in_epoch.add(means)
        rows = rows_of(batch["steering_mask"])
        biases = torch.tensor([config_of(self._peft_model, name).coefficient_bias for name in self.adapters])
        strength = batch["alpha"] + biases.to(batch["alpha"].device)[batch["adapter"]]
        self._gates.add(epoch, student.gates, strength[rows] != 0, batch["adapter"][rows])

    def _over_processes(self, counts: dict[GateKey, torch.Tensor]) -> dict[GateKey, torch.Tensor]:
        """The counts of all processes together."""
        if not counts:
            return {}
        flat = torch.cat([values.to(self.args.device).flatten() for values in counts.values()])
        pieces = self.accelerator.reduce(flat, "sum").split([values.numel() for values in counts.values()])
        return {key: piece.view_as(values) for (key, values), piece in zip(counts.items(), pieces, strict=True)}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to a training log; every process has to call it, as `Trainer` does."""
        if "loss" in logs and self._since_log.count:
            names, means = self._since_log.take(self.args.device)
            logs |= dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            counts = self._over_processes(self._gates.since_log())
            live = torch.cat([opened.flatten() for opened, _ in counts.values()]) > 0
            logs["live_gates"] = live.float().mean().item()
        super().log(logs, *args, **kwargs)
