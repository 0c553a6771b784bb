"""What a steered model can still do, by the tasks of lm-evaluation-harness, where it is installed.

The harness is given the model as it is in memory, adapter and all. Its own class for such models would steer the
wrong tokens: it scores a continuation in one forward call that does not say where the continuation begins, and a PSR
adapter then takes all of it for a prompt. Here each continuation is scored with those tokens edited that would be
edited while it is generated: from the context's last one on. Generation needs nothing special.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from peft_psr.positions import pad_rows, pad_tokens
from peft_psr.training.progress import Progress

from .adapters.registry import find_kind
from .faithfulness import log_probs_at


def check_capability(tasks: Sequence[str], include_path: str | None = None) -> None:
    """Raises what can be known to be wrong before any long work; arguments as `evaluate_capability`.

    `ImportError` without lm-evaluation-harness, `FileNotFoundError` without the folder, `ValueError` without such a
    task.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"capability_include_path: no folder {include_path!r}.")
    known = _task_manager(include_path).all_tasks
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(
            f"capability_tasks: lm-evaluation-harness has no {', '.join(map(repr, unknown))}; `lm_eval ls tasks` "
            "lists them. Tasks of your own are found by capability_include_path."
        )


def evaluate_capability(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | None = None,
    batch_size: int = 16,
    system_instruction: str | None = None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Scores of a model on the harness's tasks; questions are put through the chat template where there is one.

    A PSR or LoRA adapter is at the strength that is wanted. `tasks` are names of tasks or groups, also of those in the
    folder `include_path`; at most `limit` questions a task, `batch_size` a forward pass, each with the
    `system_instruction` in its system turn.

    Returns:
        {task: {metric: {"value", "stderr"}}}, in the metric's own unit; `None` for a standard error that there is not.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
    """
    harness = _harness()
    found = harness.simple_evaluate(
        model=_model_class()(pretrained=model, tokenizer=processing_class, batch_size=batch_size),
        tasks=list(tasks),
        limit=limit,
        task_manager=_task_manager(include_path),
        apply_chat_template=processing_class.chat_template is not None,
        system_instruction=system_instruction,
        log_samples=False,
    )
    return {
        task: {
            metric.removesuffix(",none"): {"value": float(value), "stderr": _stderr(values, metric)}
            for metric, value in values.items()
            if isinstance(value, (int, float)) and "," in metric and "_stderr," not in metric
        }
        for task, values in found["results"].items()
    }


def _stderr(values: dict[str, Any], metric: str) -> float | None:
    name, _, how = metric.partition(",")
    value = values.get(f"{name}_stderr,{how}")
    return float(value) if isinstance(value, (int, float)) else None


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError(
            "capability_tasks need lm-evaluation-harness, which is not installed: pip install 'peft-psr[ifeval]'."
        ) from error
    return lm_eval


@cache
def _task_manager(include_path: str | None) -> Any:
    _harness()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


@cache
def _model_class() -> type:
    from lm_eval.models.huggingface import HFLM

    class SteeredLM(HFLM):
        """The harness's own class with continuations scored as they would be generated."""

        @torch.no_grad()
        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            """[(log-likelihood, whether it is the likeliest)] of (strings, context ids, continuation ids)."""
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            size = override_bs or self.batch_size
            answers: dict[int, tuple[float, bool]] = {}
            with Progress("scoring", len(order), unit="answers", shown=not disable_tqdm) as progress:
                for start in range(0, len(order), size):
                    chosen = order[start : start + size]
                    pairs = [(requests[i][1], requests[i][2]) for i in chosen]
                    scores = score_continuations(self.model, self.tokenizer, pairs, self.max_length)
                    answers |= zip(chosen, scores, strict=True)
                    progress.advance(len(chosen))
            for i, (strings, _, _) in enumerate(requests):
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, answers[i])
            return [answers[i] for i in range(len(requests))]

    return SteeredLM


@torch.no_grad()
def score_continuations(
    model: Any,
    processing_class: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
) -> list[tuple[float, bool]]:
    """Log-likelihood of continuations, with the tokens edited that are edited when they are generated.

    `pairs` are token ids of each context and continuation, neither of them empty; contexts are cut on the left to
    `max_length`.

    Returns:
        For each the sum of its tokens' log-probabilities, in nats, and whether each of them is the likeliest token.
    """
    rows = [[*context, *continuation][-(max_length + 1) :] for context, continuation in pairs]
    labels = [
        [-100] * (len(row) - len(continuation)) + list(continuation)[-len(row) :]
        for row, (_, continuation) in zip(rows, pairs, strict=True)
    ]
    batch = pad_tokens(processing_class, [row[:-1] for row in rows], model.device, side="right")
    targets = pad_rows([row[1:] for row in labels], -100, model.device, side="right")
    wanted = targets != -100
    inputs: dict[str, Any] = dict(batch)
    if kind := find_kind(model):
        inputs |= kind.scoring_inputs(model, wanted, batch["attention_mask"])
    log_probs = log_probs_at(model(**inputs, use_cache=False).logits, wanted)  # (continuation tokens, vocabulary)
    expected = targets[wanted]
    found, likeliest = torch.zeros(wanted.shape, device=model.device), torch.ones_like(wanted)
    found[wanted] = log_probs.gather(-1, expected[:, None])[:, 0]
    likeliest[wanted] = log_probs.argmax(dim=-1) == expected
    return list(zip(found.sum(dim=1).tolist(), likeliest.all(dim=1).tolist(), strict=True))
