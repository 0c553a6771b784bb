"""What the prompted model (teacher) and the steered model (student) compute on the same tokens, layer by layer.

Teacher: A_{l|PS} = A_l(x' y') without gradient; student: A_{l|AS} = A_l(x y') under the edited model; both only at the
tokens that the mask names, in the same order. Source: arXiv 2605.03907.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel

from peft_psr.base_model.decoder import capture_layer_outputs, decoder_layer_names
from peft_psr.config import PSRConfig
from peft_psr.model import PSRModel
from peft_psr.training.data.collator import Batch, branch_inputs

from .partial import in_eval_mode


@dataclass
class Branch:
    """One forward pass over a batch."""

    # {layer name: (tokens, d)}: layer outputs at the masked tokens of all rows, row after row
    hidden: dict[str, torch.Tensor]
    # {(layer name, adapter): (tokens, r)} at the same tokens; empty without edits. With one adapter a row the name is
    # "*"
    gates: dict[tuple[str, str], torch.Tensor]
    logits: torch.Tensor | None  # (batch, seq, vocabulary), or `None` where not asked for


def psr_model(model: torch.nn.Module) -> PSRModel:
    """The PSR tuner inside a PEFT model; raises `TypeError` if there is none."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, PSRModel):
        raise TypeError(
            f"Expected a PEFT model with a PSR adapter, got {type(model).__name__}. Make one with "
            "`get_peft_model(model, PSRConfig(...))`."
        )
    return tuner


def config_of(model: PeftModel, adapter: str) -> PSRConfig:
    """The configuration of a PSR adapter."""
    return cast(PSRConfig, model.peft_config[adapter])


def layers_downstream(model: PeftModel) -> list[str]:
    """Names of the decoder layers from the first edited one on: those that the edit can change."""
    tuner = psr_model(model)
    active = tuner.active_adapters
    edited = {layer.name for layer in tuner.psr_layers().values() if any(name in layer.psr_unit for name in active)}
    names = decoder_layer_names(tuner.model, model.active_peft_config.layers_pattern)
    first = next((i for i, name in enumerate(names) if name in edited), None)
    if first is None:
        raise ValueError("No decoder layer is edited; PSR is trained on the outputs of decoder layers.")
    return names[first:]


@contextmanager
def unedited(model: PeftModel) -> Iterator[None]:
    """Inside, the model's own adapters are off, and whatever lies beneath them is on; all stays as trainable as it is.

    FSDP2 settles how it reduces gradients by `requires_grad` in its first forward call, which is the teacher's.
    Adapters of other types than PSR go off by PEFT's own `disable_adapter`.
    """
    if isinstance(model.base_model, PSRModel):
        with model.base_model.unedited():
            yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def few_logits(model: PeftModel) -> dict[str, torch.Tensor]:
    """Arguments of a forward call that spare the model most of its output layer, where it can be spared."""
    if "logits_to_keep" not in inspect.signature(model.get_base_model().forward).parameters:
        return {}
    # a tensor: by a number some models also cut what their upper layers compute
    return {"logits_to_keep": torch.tensor([0])}


def run_branch(
    model: PeftModel,
    batch: Batch,
    layers: Sequence[str],
    branch: str,
    logits: bool = False,
    wrapper: torch.nn.Module | None = None,
    adapter_names: Sequence[str] | None = None,
) -> Branch:
    """One forward pass: "teacher" (x' y', no edit), "student" (x y', edited) or "base" (x y', no edit).

    Args:
        model: A PEFT model with an active PSR adapter.
        batch: From `TripletCollator`, on the model's device.
        layers: Names of the layers to look at.
        branch: One of the three; only "student" keeps a graph.
        logits: Whether they are wanted; if not, the model is spared most of its output layer.
        wrapper: What to call in place of `model`: a wrapper around it that gathers gradients, such as DDP's.
        adapter_names: For the student, one adapter a row in place of the active ones.
    """
    mask = batch["teacher_mask" if branch == "teacher" else "steering_mask"].bool()
    inputs: dict[str, Any] = branch_inputs(batch, branch)
    if not logits:
        inputs |= few_logits(model)
    edited = branch == "student"
    off: AbstractContextManager[None] = nullcontext() if edited else unedited(model)
    recording: AbstractContextManager[dict[tuple[str, str], torch.Tensor]] = nullcontext({})
    if edited:
        recording = psr_model(model).record_gates()
        inputs |= {"steering_mask": batch["steering_mask"], "alpha": batch["alpha"]}
        if adapter_names is not None:
            inputs["adapter_names"] = list(adapter_names)
    with_graph = edited and torch.is_grad_enabled()
    with (
        torch.set_grad_enabled(with_graph),
        nullcontext() if with_graph else in_eval_mode(model),  # dropout would make the branches differ by noise
        off,
        capture_layer_outputs(model.get_base_model(), layers) as outputs,
        recording as gates,
    ):
        result = (model if wrapper is None else wrapper)(**inputs, use_cache=False)
    return Branch(
        hidden={name: outputs[name][mask.to(outputs[name].device)] for name in layers},
        gates={key: values[mask.to(values.device)] for key, values in gates.items()},
        logits=result.logits if logits else None,
    )
