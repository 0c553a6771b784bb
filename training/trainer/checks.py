"""What may be trained: models, adapters and processes that can't be, with the way out."""

from collections.abc import Collection, Sequence
from typing import cast

from torch import nn

from peft_psr.base_model.decoder import is_encoder_decoder
from peft_psr.config import PSRConfig
from peft_psr.model import PSRModel

from .arguments import PSRTrainingArguments


def check_decoder_only(base: nn.Module) -> None:
    """Raise `ValueError` for an encoder-decoder."""
    if is_encoder_decoder(base):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder; PSRTrainer trains decoder-only models, where prompt and "
            "completion are one sequence. An adapter on its decoder can be run, though."
        )


def check_one_gpu(args: PSRTrainingArguments) -> None:
    """Raise `ValueError` where the Trainer would spread the model over several GPUs."""
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs and would copy the model to each (nn.DataParallel), where PSR can't "
            "follow its layers. Start one process a GPU with `accelerate launch`, or let the process see one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )


def check_whole_layers(tuner: PSRModel, adapters: Sequence[str], decoder_layers: Collection[str]) -> None:
    """Raise `ValueError` if an adapter that is trained edits something else than the outputs of decoder layers."""
    edited = {layer.name for layer in tuner.psr_layers().values() if any(name in layer.psr_unit for name in adapters)}
    others = ", ".join(sorted(edited - set(decoder_layers)))
    if others:
        raise ValueError(f"norm_penalty is for edits of decoder layers, and this adapter edits {others} as well.")


def check_adapters(tuner: PSRModel, names: Sequence[str], args: PSRTrainingArguments) -> None:
    """Raise `ValueError` unless adapters can be trained together.

    They have to exist, edit the same layers with the same `r` and gate, and train in one process.
    """
    known = list(tuner.peft_config)
    if not names:
        raise ValueError("train_dataset is an empty mapping: name at least one adapter.")
    for name in names:
        if name not in known:
            raise ValueError(
                f"train_dataset names adapter {name!r}, which the model lacks; it has {', '.join(known)}."
            )
    configs = {name: cast(PSRConfig, tuner.peft_config[name]) for name in names}
    shapes = {
        name: (
            configs[name].r,
            configs[name].gate,
            [layer.name for layer in tuner.psr_layers().values() if name in layer.psr_unit],
        )
        for name in names
    }
    saving = [name for name in names if configs[name].modules_to_save]
    if saving and len(names) > 1:
        raise ValueError(
            f"Adapters with modules_to_save ({', '.join(saving)}) can't train together: one at a time can use those "
            "modules. Train them one after the other."
        )
    for name, shape in shapes.items():
        if shape != shapes[names[0]]:
            raise ValueError(
                f"Adapters that train together edit the same layers with the same r and gate; {names[0]!r} has "
                f"{shapes[names[0]]}, {name!r} has {shape}. Train them one after the other."
            )
    if args.world_size > 1:
        raise ValueError(
            f"Several adapters train together in one process, here are {args.world_size}. Give each process its own "
            "adapters, or train them one after the other."
        )


def check_directions(tuner: PSRModel, names: Sequence[str]) -> None:
    """Raise `ValueError` if frozen directions of an adapter are all 0, where its gates have nothing to do."""
    for name in names:
        units = [layer.unit(name) for layer in tuner.psr_layers().values() if name in layer.psr_unit]
        frozen = cast(PSRConfig, tuner.peft_config[name]).freeze_directions
        if frozen and not any(unit.direction.is_meta or unit.direction.any() for unit in units):
            raise ValueError(
                f"Adapter {name!r} has freeze_directions=True and directions that are all 0, so nothing can be "
                "learned. Set them first: `initialize_psr_weights(model, triplets, directions=...)`."
            )
