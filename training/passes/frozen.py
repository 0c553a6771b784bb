"""What the frozen model computes for a batch: the teacher's activations, and the stream below the first edit.

Both are the same in every epoch, so they are computed once and kept where they fit (see `activation_cache`). With the
stream below the first edit known, a training step computes the layers above it alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel

from peft_psr.base_model.decoder import capture_layer_outputs, decoder_layer_names, text_config
from peft_psr.training.data.collator import Batch, branch_inputs, rows_at
from peft_psr.training.data.dataset import Row

from .activation_cache import ActivationCache, CacheSettings, plan_cache
from .branches import few_logits, psr_model, run_branch, unedited
from .partial import known_output, stop_after


logger = logging.getLogger(__name__)


class FrozenModel:
    """The parts of a PEFT model that training does not change, for the triplets of its data sets.

    Args:
        model: The PEFT model.
        rows: All triplets, in the order of their `index`.
        first_edited: Name of the first decoder layer that is edited.
        teacher_layers: The layers whose prompted activations the objectives look at; may be none.
        settings: Where activations may be kept.
        from_start: Every forward call has to compute all layers, as gradient checkpointing does.
        sharded: The model's weights are spread over processes.

    Attributes:
        place: Where the activations are kept: "memory", "disk" or "none".
    """

    def __init__(
        self,
        model: PeftModel,
        rows: Sequence[Row],
        first_edited: str,
        teacher_layers: Sequence[str],
        settings: CacheSettings,
        from_start: bool,
        sharded: bool,
    ) -> None:
        base = model.get_base_model()
        names = decoder_layer_names(base, model.active_peft_config.layers_pattern)
        trained_elsewhere = any(p.requires_grad and ".psr_unit." not in n for n, p in model.named_parameters())
        # edits inside a decoder layer: what is not computed is not edited
        inside = any(layer.name not in names for layer in psr_model(model).psr_layers().values())
        # upper layers that read the keys and values of lower ones
        shares = getattr(text_config(base), "num_kv_shared_layers", 0)
        whole = from_start or trained_elsewhere or inside or shares
        reason = None
        if any(parameter.is_meta for parameter in base.parameters()):
            reason = "part of the base model is offloaded"
        elif sharded:
            reason = "the base model is sharded, so that all processes have to run each layer at the same time"
        self.model, self.teacher_layers = model, list(teacher_layers)
        # the decoder layers up to the first edited one, where the stream there may be kept
        self.below = [] if whole else names[: names.index(first_edited) + 1]
        self._teacher_lengths = [row["mask_length"] for row in rows]
        self._stream_lengths = [len(row["input_ids"]) for row in rows]
        self._folder = settings.folder
        width, itemsize = text_config(base).hidden_size, next(base.parameters()).dtype.itemsize
        numbers = sum(self._teacher_lengths) * len(self.teacher_layers) + sum(self._stream_lengths) * bool(self.below)
        self.place = plan_cache(settings, numbers * width * itemsize, reason)
        self._teacher: ActivationCache | None = None
        self._stream: ActivationCache | None = None
        self._trusted: bool | None = None

    def _cache(self, lengths: list[int], names: list[str], example: torch.Tensor) -> ActivationCache:
        folder = self._folder if self.place == "disk" else None
        return ActivationCache(lengths, names, example.shape[-1], example.dtype, folder)

    def _keeps(self, batch: Batch) -> bool:
        return self.place != "none" and bool((batch["index"] >= 0).all())

    def _device(self, name: str) -> torch.device:
        return next(self.model.get_base_model().get_submodule(name).parameters()).device

    @torch.no_grad()
    def teacher(self, batch: Batch) -> dict[str, torch.Tensor]:
        """{layer name: (tokens, d)}: A_l(x' y') at the masked tokens; empty if no layers are wanted."""
        names = self.teacher_layers
        if not names:
            return {}
        if not self._keeps(batch):
            return run_branch(self.model, batch, names, "teacher").hidden
        missing = _missing(self._teacher, batch)
        if missing["index"].numel():
            hidden = run_branch(self.model, missing, names, "teacher").hidden
            if self._teacher is None:
                self._teacher = self._cache(self._teacher_lengths, names, hidden[names[0]])
            self._teacher.put(missing["index"], hidden)
        assert self._teacher is not None
        return self._teacher.get(batch["index"], {name: self._device(name) for name in names})

    @contextmanager
    def layers_below_known(self, batch: Batch) -> Iterator[None]:
        """Inside, calls on `batch` start from the first edited layer's own output, where that may be kept."""
        if not self.below or not self._keeps(batch) or self._trusted is False:
            yield
            return
        base, tokens = self.model.get_base_model(), batch["attention_mask"].bool()
        flat = self._stream_of(batch)
        hidden = flat.new_zeros(*tokens.shape, flat.shape[-1])
        hidden[tokens.to(hidden.device)] = flat
        if self._trusted is None:
            self._trusted = self._check(batch, hidden)
            if not self._trusted:
                self._stream = None if self._trusted is False else self._stream
                yield
                return
        with known_output(base, self.below, hidden, edited=False):
            yield

    @torch.no_grad()
    def _stream_of(self, batch: Batch) -> torch.Tensor:
        first = self.below[-1]
        missing = _missing(self._stream, batch)
        if missing["index"].numel():
            self._run_below(missing)
        assert self._stream is not None
        return self._stream.get(batch["index"], {first: self._device(first)})[first]

    def _run_below(self, batch: Batch) -> None:
        first, base = self.below[-1], self.model.get_base_model()
        names = decoder_layer_names(base, self.model.active_peft_config.layers_pattern)
        with (
            unedited(self.model),
            stop_after(base, names[len(self.below) :]),
            capture_layer_outputs(base, [first]) as outputs,
        ):
            self.model(**branch_inputs(batch, "base"), **few_logits(self.model), use_cache=False)
        flat = outputs[first][batch["attention_mask"].bool().to(outputs[first].device)]
        if self._stream is None:
            self._stream = self._cache(self._stream_lengths, [first], flat)
        self._stream.put(batch["index"], {first: flat})

    @torch.no_grad()
    def _check(self, batch: Batch, hidden: torch.Tensor) -> bool | None:
        """Whether starting from the known stream gives what the whole model gives, on one batch.

        `None` if that can't be told because the whole model's activations are not finite.
        """
        base = self.model.get_base_model()
        last = decoder_layer_names(base, self.model.active_peft_config.layers_pattern)[-1]
        whole = run_branch(self.model, batch, [last], "base").hidden[last].float()
        if not whole.isfinite().all():
            return None
        with known_output(base, self.below, hidden, edited=False):
            part = run_branch(self.model, batch, [last], "base").hidden[last].float()
        if torch.allclose(whole, part, rtol=1e-2, atol=1e-2 * whole.abs().mean().item()):
            return True
        logger.warning(
            "%s can't be run from the middle (its last layer comes out different), so the layers below the first "
            "edited one are computed at every step.",
            type(base).__name__,
        )
        return False


def _missing(cache: ActivationCache | None, batch: Batch) -> Batch:
    """The rows of a batch that a cache does not hold."""
    if cache is None:
        return batch
    return rows_at(batch, ~cache.holds(batch["index"]).to(batch["index"].device))
