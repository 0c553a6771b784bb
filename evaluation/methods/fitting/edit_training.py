"""Training of an edit of one layer that becomes a PSR adapter only afterwards: what it adds may be any function of h.

    h_i  <-  h_i + m_i * edit(h)_i                      m: the mask of `TripletCollator`, as PSR has it

The base model is frozen and in eval mode; the optimiser sees the edit's own weights alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer

from peft_psr import PSRConfig
from peft_psr.base_model.decoder import decoder_layer_names, hidden_of
from peft_psr.evaluation.methods.method import FitSettings
from peft_psr.training.data.collator import Batch
from peft_psr.training.objectives.ll import LL
from peft_psr.training.objectives.objective import Passes
from peft_psr.training.passes.branches import psr_model, run_branch
from peft_psr.unit import PSRUnit

from .trainer_settings import text_arguments, train_quietly


Edit = Callable[[torch.Tensor], torch.Tensor]
"""From the layer's output (batch, seq, d), float32, to what is added to it, which broadcasts over the same."""

Loss = Callable[[Batch, float], torch.Tensor]
"""From a batch and the share of training done (0-1) to a loss for each triplet, (batch,)."""


def only_unit(model: PeftModel) -> PSRUnit:
    """The weights of a single-layer PSR adapter named "default"."""
    (layer,) = psr_model(model).psr_layers().values()
    return layer.unit("default")


def single_layer(model: PreTrainedModel, settings: FitSettings, **config: Any) -> tuple[PeftModel, PSRUnit]:
    """The model in eval mode with a PSR adapter on the settings' layer, and the adapter's weights.

    `config` are further fields of `PSRConfig`; the adapter's random weights are of torch's generator.
    """
    steered = get_peft_model(
        model, PSRConfig(layers_to_transform=settings.layer, positions=settings.positions, **config)
    )
    return steered.eval(), only_unit(steered)


@contextmanager
def edited(model: PeftModel, edit: Edit, mask: torch.Tensor) -> Iterator[None]:
    """Inside, the layer that the PSR adapter of `model`, switched off, belongs to returns h + m * edit(h).

    The edit is computed in float32 on the device of `mask`, (batch, seq), then cast back.
    """
    (layer,) = psr_model(model).psr_layers().values()

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = hidden_of(output, layer.name)
        stream = hidden.to(mask.device, torch.float32)
        new = (stream + mask[..., None] * edit(stream)).to(hidden)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = model.get_base_model().get_submodule(layer.name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def mean_log_likelihood(model: PeftModel, batch: Batch, edit: Edit | None = None) -> torch.Tensor:
    """(1 / |y|) log p(y | x) of each row's response y under the base model, or under the edited one; nats.

    `model` has a PSR adapter on one layer, switched off. Returns (batch,) float32, with the graph of the edit.
    """
    last = decoder_layer_names(model.get_base_model())[-1]
    with edited(model, edit or torch.zeros_like, batch["steering_mask"]):
        student = run_branch(model, batch, [last], "student")
    return -LL.loss(Passes(model, batch, [last], student)).to(batch["alpha"].device)


def train_edit(
    model: PeftModel,
    edit: nn.Module,
    loss: Loss,
    rows: Sequence[Any],
    collate: Callable[[Sequence[Any]], Batch],
    settings: FitSettings,
    learning_rate: float,
) -> None:
    """Train an edit's weights in place: AdamW without weight decay, linear to zero, gradients clipped at norm 1.

    The model has a PSR adapter on the layer to edit, switched off, and is left as it is; `edit` holds what is trained
    and is moved to the model's device. `loss` is averaged over batches that `collate` makes of encoded `rows`. Heeded
    of the settings: epochs for objectives on text, batch size, seed, `on_step`, and their learning rate in the
    method's place.

    Raises:
        FloatingPointError: the loss is infinite or not a number.
        ValueError: as `text_arguments`.
    """
    with TemporaryDirectory() as folder:
        rate = settings.learning_rate or learning_rate
        arguments = text_arguments(folder, model, settings, rate, data_seed=settings.seed)
        train_quietly(_EditTrainer(loss, edit, arguments, collate, cast(Any, list(rows))), settings.on_step)


class _EditTrainer(Trainer):
    """transformers' Trainer of the edit's weights; the model that they edit is no part of what it sees."""

    def __init__(self, loss: Loss, *args: Any) -> None:
        super().__init__(*args)
        self.loss = loss
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The mean over the batch; () float32."""
        value = self.loss(inputs, self.state.global_step / self.state.max_steps).mean()
        if not torch.isfinite(value):
            raise FloatingPointError(
                f"Step {self.state.global_step}: the loss is {value.item()}. A smaller learning_rate may help."
            )
        return value
