"""Both branches of a triplet as one batch: the student reads x y', the teacher x' y'.

The same token of y' stands at different positions in the two, so everything is aligned from the right end. The mask is
one and the same for the edit and for the loss (METHOD 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch

from peft_psr.config import POSITIONS, check_strength
from peft_psr.positions import common_suffix_length, pad_rows, pad_tokens, question_start
from peft_psr.prompts.conversations import Prompt, decode_completion, encode_completion, encode_prompt

from .triplets import check_triplet


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Batch(TypedDict):
    """Triplets as tensors, rows padded on the right.

    Both masks name the same tokens in the same order.
    """

    input_ids: torch.Tensor  # the student's x y', (batch, seq) int64
    attention_mask: torch.Tensor  # (batch, seq) int64, 0 for padding
    labels: torch.Tensor  # (batch, seq) int64, -100 outside y'
    steering_mask: torch.Tensor  # (batch, seq) int64, 1 where the edit and the loss are
    teacher_input_ids: torch.Tensor  # the teacher's x' y', (batch, teacher seq) int64
    teacher_attention_mask: torch.Tensor  # likewise
    teacher_mask: torch.Tensor  # likewise, `steering_mask` on the teacher's side
    alpha: torch.Tensor  # strength of the edit, (batch,) float32
    neutral: torch.Tensor  # (batch,) bool: the two prompts are one and the same, so the edit is to change nothing
    adapter: torch.Tensor  # (batch,) int64: which of several adapters the triplet belongs to
    index: torch.Tensor  # (batch,) int64: the triplet's place among all; -1 for one not in a data set


def branch_inputs(batch: Batch, branch: str) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of the "teacher" (x' y'), or of any other branch (x y')."""
    if branch == "teacher":
        return {"input_ids": batch["teacher_input_ids"], "attention_mask": batch["teacher_attention_mask"]}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with all its tensors on a device."""
    return cast(Batch, {name: cast(torch.Tensor, values).to(device) for name, values in batch.items()})


def rows_at(batch: Batch, chosen: torch.Tensor) -> Batch:
    """The rows of a batch that (batch,) bool chooses."""
    return cast(Batch, {name: cast(torch.Tensor, values)[chosen] for name, values in batch.items()})


class TripletCollator:
    """Turns triplets into the batches, `Batch`, that `PSRTrainer` and the measures work on.

    Args:
        processing_class: A tokenizer.
        positions: "response": from the last prompt token on; "question_and_response": from the last token of the
            system turn on; "all": likewise, the tokens that both branches share.
        alpha: "trait_score" to weigh each triplet's edit by the judge's trait score (divided by 100; 1 for a neutral
            triplet, which shows no trait), or one number.

    Raises:
        TypeError: alpha is neither.
        ValueError: `positions` is unknown.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase,
        positions: str = "response",
        alpha: str | float = "trait_score",
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(map(repr, POSITIONS))}, got {positions!r}.")
        self.processing_class = processing_class
        self.positions = positions
        self.alpha = alpha if alpha == "trait_score" else check_strength(alpha, "alpha")

    def encode(self, triplet: Mapping[str, Any], where: str = "triplet") -> dict[str, Any]:
        """Token ids of both branches of one triplet, checked.

        Returns:
            `input_ids`, `teacher_input_ids` (lists of ints), `prompt_length` of the student, `mask_length` (how many
            last tokens are edited and enter the loss, in either branch), `alpha` and `neutral`.

        Raises:
            ValueError: a field is missing, the completion's tokens differ between the branches, or, where the question
                is edited, the question's do; the message names `where`.
        """
        check_triplet(triplet, where)
        tokenizer, prompt, steered = self.processing_class, triplet["prompt"], triplet["steered_prompt"]
        try:
            prompt_ids, steered_ids = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, steered)
        except ValueError as error:  # a template may refuse the system turn
            raise ValueError(f"{where}: {error}") from error
        completion = self._completion(triplet, prompt_ids, where)
        if not completion:
            raise ValueError(f"{where}: the completion {triplet['completion']!r} has no tokens.")
        return {
            "input_ids": prompt_ids + completion,
            "teacher_input_ids": steered_ids + completion,
            "prompt_length": len(prompt_ids),
            "mask_length": len(completion) + self._prompt_tokens(prompt, prompt_ids, steered, steered_ids, where),
            "alpha": self.strength(triplet, where, neutral=prompt_ids == steered_ids),
            "neutral": prompt_ids == steered_ids,
        }

    def _completion(self, triplet: Mapping[str, Any], prompt_ids: list[int], where: str) -> list[int]:
        """The completion's tokens, the same in both branches: those that were drawn, if the triplet holds them."""
        tokenizer, text = self.processing_class, triplet["completion"]
        truncated, drawn = bool(triplet.get("truncated")), triplet.get("completion_ids")
        if drawn is not None:
            without_end = drawn if truncated else drawn[:-1]
            for ids in (without_end, drawn):  # the latter where a text, and no token, has ended it
                if decode_completion(tokenizer, triplet["prompt"], prompt_ids, ids) == text:
                    return list(drawn)
            raise ValueError(
                f"{where}: completion_ids are not the tokens of the completion {text[:60]!r}. If the text was "
                "changed, or the tokens are another model's, take completion_ids out."
            )
        try:
            completion = encode_completion(tokenizer, triplet["prompt"], text, truncated)
            teacher_completion = encode_completion(tokenizer, triplet["steered_prompt"], text, truncated)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if completion != teacher_completion:
            raise ValueError(
                f"{where}: the completion tokenises differently after `prompt` ({completion[:8]}...) and after "
                f"`steered_prompt` ({teacher_completion[:8]}...), so the branches can't be aligned. Make both prompts "
                "end alike."
            )
        return completion

    def _prompt_tokens(
        self, prompt: Prompt, prompt_ids: list[int], steered: Prompt, steered_ids: list[int], where: str
    ) -> int:
        """Count of the last prompt tokens that are edited."""
        if self.positions == "response":
            return 1
        if isinstance(prompt, str) or isinstance(steered, str):
            return max(1, common_suffix_length(prompt_ids, steered_ids))
        count = min(
            len(prompt_ids) - question_start(self.processing_class, prompt),
            len(steered_ids) - question_start(self.processing_class, steered),
        )
        if common_suffix_length(prompt_ids, steered_ids) < count:
            raise ValueError(
                f"{where}: the question's tokens differ between `prompt` and `steered_prompt`, so they can't be "
                "trained on. Put the instruction in the system turn, or use positions='response'."
            )
        return count

    def strength(self, triplet: Mapping[str, Any], where: str, neutral: bool) -> float:
        """The edit's strength on a triplet; `ValueError`, naming `where`, if it has no trait score to take it from."""
        if isinstance(self.alpha, float):
            return self.alpha
        if neutral:
            return 1.0
        score = triplet.get("trait_score")
        if score is None:
            raise ValueError(f"{where} has no trait_score to take alpha from. Score it, or give alpha as a number.")
        return score / 100

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch from triplets, or from what `encode` made of them."""
        features = [row for feature in features for row in feature.get("rows", (feature,))]
        rows = [f if "mask_length" in f else self.encode(f, f"triplet {i}") for i, f in enumerate(features)]

        def tokens(name: str) -> dict[str, torch.Tensor]:
            return pad_tokens(self.processing_class, [r[name] for r in rows], side="right")

        def mask(name: str) -> torch.Tensor:
            return pad_rows([_last(len(r[name]), r["mask_length"]) for r in rows], 0, side="right")

        labels = [[-100] * r["prompt_length"] + r["input_ids"][r["prompt_length"] :] for r in rows]
        student, teacher = tokens("input_ids"), tokens("teacher_input_ids")
        return {
            "input_ids": student["input_ids"],
            "attention_mask": student["attention_mask"],
            "labels": pad_rows(labels, -100, side="right"),
            "steering_mask": mask("input_ids"),
            "teacher_input_ids": teacher["input_ids"],
            "teacher_attention_mask": teacher["attention_mask"],
            "teacher_mask": mask("teacher_input_ids"),
            "alpha": torch.tensor([r["alpha"] for r in rows], dtype=torch.float32),
            "neutral": torch.tensor([r["neutral"] for r in rows]),
            "adapter": torch.tensor([r.get("adapter", 0) for r in rows]),
            "index": torch.tensor([r.get("index", -1) for r in rows]),
        }

    def steering_batches(
        self, triplets: Sequence[Mapping[str, Any]], batch_size: int = 16
    ) -> list[dict[str, torch.Tensor]]:
        """The student's branch alone, as arguments of forward calls: `input_ids`, `attention_mask`, `steering_mask`.

        Raises `ValueError`, naming it, for a triplet that can't be used.
        """
        rows = [self.encode(triplet, f"triplet {i}") for i, triplet in enumerate(triplets)]
        batches = [self(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        return [branch_inputs(batch, "student") | {"steering_mask": batch["steering_mask"]} for batch in batches]


def _last(length: int, count: int) -> list[int]:
    return [0] * (length - count) + [1] * count
