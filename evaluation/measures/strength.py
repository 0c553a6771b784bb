"""The strength alpha of an adapter, and what a model computes and answers at it, for PSR and PEFT's LoRA alike.

    PSR     A <- A + alpha * edit(A)
    LoRA    W <- W + alpha * (lora_alpha / r) * B A     on every token, the prompt's included; arXiv 2106.09685

1 is the adapter as it was trained, 0 the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from peft_psr.base_model.decoder import capture_layer_outputs
from peft_psr.config import PSRConfig, check_strength
from peft_psr.model import PSRModel
from peft_psr.prompts.conversations import Prompt
from peft_psr.training import sample_completions
from peft_psr.training.data.collator import Batch, branch_inputs
from peft_psr.training.data.draws import Completion
from peft_psr.training.passes.branches import Branch, config_of, few_logits, run_branch
from peft_psr.training.passes.partial import in_eval_mode


def has_lora(model: torch.nn.Module) -> bool:
    """Whether the adapters of a PEFT model are LoRA's."""
    return isinstance(model, PeftModel) and type(model.base_model) is LoraModel


def adapter_config(model: torch.nn.Module) -> PSRConfig | LoraConfig:
    """The configuration of the active adapter.

    Raises:
        TypeError: it is neither a PSR nor a LoRA adapter, or there is none.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not has_lora(model) and not isinstance(tuner, PSRModel):
        kind = type(model).__name__ if tuner is None else type(tuner).__name__
        raise TypeError(f"Only a PEFT model with a PSR or a LoRA adapter has a strength alpha, got {kind}.")
    return cast(PSRConfig | LoraConfig, cast(PeftModel, model).active_peft_config)


def edited_positions(model: PeftModel) -> str:
    """The tokens on which hidden states are compared: those a PSR adapter edits; the response for a LoRA."""
    config = adapter_config(model)
    return config.positions if isinstance(config, PSRConfig) else "response"


@contextmanager
def at_strength(model: PeftModel, alpha: float) -> Iterator[None]:
    """Sets the strength of the active adapters inside the context; it replaces theirs, nested or not.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter.
        alpha: A finite number; negative ones steer away.

    Raises:
        TypeError: the model has neither adapter, or alpha is not a number.
        ValueError: alpha is not finite; or a LoRA does more than to add to weights, or has been merged into them.
    """
    alpha = check_strength(alpha, "alpha")
    adapter_config(model)
    if has_lora(model):
        layers = _lora_layers(model)
        scalings = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                for name in layer.active_adapters:
                    layer.set_scale(name, alpha)
            yield
        finally:
            for layer, scaling in zip(layers, scalings, strict=True):
                layer.scaling.update(scaling)
        return
    tuner = cast(PSRModel, model.base_model)
    before = {name: config_of(model, name).alpha for name in tuner.active_adapters}
    try:
        for name in before:
            tuner.set_alpha(alpha, name)
        yield
    finally:
        for name, its_own in before.items():
            tuner.set_alpha(its_own, name)


def _lora_layers(model: PeftModel) -> list[LoraLayer]:
    """All LoRA layers, if scaling them scales all that the active adapters do."""
    layers: list[LoraLayer] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is merged into the weights, where its strength can't be set; `unmerge_adapter()`.")
    for name in model.active_adapters:
        config = cast(LoraConfig, model.peft_config[name])
        parts = {part: getattr(config, part) for part in ("modules_to_save", "trainable_token_indices")}
        parts["bias"] = None if config.bias == "none" else config.bias
        variants = {type(layer.lora_variant[name]).__name__ for layer in layers if name in layer.lora_variant}
        parts["variant"] = ", ".join(variants)
        unscaled = ", ".join(f"{part}={value!r}" for part, value in parts.items() if value)
        if unscaled:
            raise ValueError(
                f"LoRA adapter {name!r} has {unscaled}, which does not scale with alpha. Only a plain LoRA, which "
                "adds alpha * B A to weights, has a strength."
            )
    return layers


def run_adapter_branch(
    model: PeftModel, batch: Batch, layers: Sequence[str], branch: str, logits: bool = False
) -> Branch:
    """`peft_psr.training.passes.branches.run_branch` without gradient, for a model with either adapter.

    Args:
        model: A PEFT model with an active PSR or LoRA adapter.
        batch: From `TripletCollator`, on the model's device; with a LoRA, of one strength.
        layers: Names of the layers to look at.
        branch: "teacher" (x' y', adapter off), "base" (x y', adapter off) or "student" (x y', adapter on).
        logits: Whether the logits are wanted.

    Raises:
        TypeError: the model has neither adapter.
        ValueError: several strengths in a batch for a LoRA.
    """
    with torch.no_grad():
        if branch != "student" or not has_lora(model):
            return run_branch(model, batch, layers, branch, logits)
        strengths = set(batch["alpha"].tolist())
        if len(strengths) > 1:
            raise ValueError(f"A LoRA has one strength for the whole batch, got {sorted(strengths)}.")
        inputs: dict[str, Any] = branch_inputs(batch, branch)
        if not logits:
            inputs |= few_logits(model)
        captured = capture_layer_outputs(model.get_base_model(), layers)
        with in_eval_mode(model), at_strength(model, *strengths), captured as outputs:
            result = model(**inputs, use_cache=False)
        mask = batch["steering_mask"].bool()
        hidden = {name: outputs[name][mask.to(outputs[name].device)] for name in layers}
        return Branch(hidden, gates={}, logits=result.logits if logits else None)


def sample_steered(
    model: PreTrainedModel | PeftModel,
    processing_class,
    prompts: Sequence[Prompt],
    alpha: Sequence[float] | None,
    **settings: Any,
) -> list[Completion]:
    """`sample_completions` for a model with either adapter: a LoRA's strengths are sampled one after the other.

    Args:
        model: Any causal language model.
        processing_class: Its tokenizer.
        prompts: Conversations or plain texts.
        alpha: One strength a prompt; `None` for the adapter as it is, or a model without one.
        **settings: Of `sample_completions`.

    Returns:
        One completion for each prompt, in the order of the prompts. With a LoRA it depends on the seed and on the
        prompt's place among those of its strength.

    Raises:
        ValueError: as `sample_completions` and `at_strength`.
    """
    if alpha is None or not has_lora(model):
        return sample_completions(model, processing_class, prompts, alpha=alpha, **settings)
    places: dict[float, list[int]] = {}
    for place, (_, strength) in enumerate(zip(prompts, alpha, strict=True)):
        places.setdefault(strength, []).append(place)
    completions: dict[int, Completion] = {}
    for strength, of_strength in places.items():
        with at_strength(cast(PeftModel, model), strength):
            drawn = sample_completions(model, processing_class, [prompts[i] for i in of_strength], **settings)
        completions |= zip(of_strength, drawn, strict=True)
    return [completions[place] for place in range(len(prompts))]
