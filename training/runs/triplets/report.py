"""What a run drew, kept and dropped, and why: counts, histograms of the scores, examples of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from peft_psr.files import as_png
from peft_psr.prompts.conversations import prompt_text
from peft_psr.training.data.filtering import NEAR_DUPLICATE, REASONS, FilterSettings

from .recipe import Recipe


EXAMPLES = 2
LONGEST_EXAMPLE = 600
KEPT, KEPT_NEGATIVE = "kept", "kept as negative"


@dataclass(frozen=True)
class Counts:
    """What became of every draw."""

    planned: int  # draws of the recipe
    drawn: int  # those that gave a completion
    judged: int  # those that were scored, or were empty or could not be trained on and need no score
    kept: int  # triplets to train on
    negatives: int  # completions kept apart
    truncated: int  # of the kept triplets, how many were cut off at the token limit
    dropped: dict[str, int]  # {reason: count}, of what was judged
    traits: dict[str, dict[str, int]]  # {trait: {what became of it: count}}
    # {reason: count} of all failed attempts at drawing or judging, those made good later included
    failures: dict[str, int]
    tokens: dict[str, int]  # what sampling and judging cost, as far as the engines say

    @classmethod
    def of(
        cls,
        rows: Sequence[Mapping[str, Any]],
        reasons: Sequence[str | None],
        planned: int,
        completion_records: Sequence[Mapping[str, Any]],
        score_records: Sequence[Mapping[str, Any]],
    ) -> Counts:
        """Counts rows, and what the records of the run's journals say; `reasons` are `None` for what was kept."""
        fates = [fate(row, reason) for row, reason in zip(rows, reasons, strict=True)]
        traits: dict[str, Counter[str]] = {}
        for row, what in zip(rows, fates, strict=True):
            traits.setdefault(row["trait"], Counter())[what] += 1
        every = Counter(fates)
        failures = Counter(
            record["failure"] for record in [*completion_records, *score_records] if "failure" in record
        )
        tokens: Counter[str] = Counter()
        for record in completion_records:
            for name in ("prompt_tokens", "completion_tokens"):
                tokens[f"sampling {name.replace('_', ' ')}"] += record.get(name) or 0
        for record in score_records:
            for name, count in record.get("usage", {}).items():
                tokens[f"judging {name.replace('_', ' ')}"] += count
        return cls(
            planned=planned,
            drawn=len({record["id"] for record in completion_records if "failure" not in record}),
            judged=len(rows),
            kept=every[KEPT],
            negatives=every[KEPT_NEGATIVE],
            truncated=sum(row["truncated"] for row, what in zip(rows, fates, strict=True) if what == KEPT),
            dropped={reason: every[reason] for reason in REASONS if every[reason]},
            traits={trait: dict(sorted(counter.items())) for trait, counter in traits.items()},
            failures=dict(sorted(failures.items())),
            tokens=dict(sorted(tokens.items())),
        )

    def why(self) -> str:
        """Why completions were dropped, in one line."""
        return ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items()) or "nothing was judged"


def fate(row: Mapping[str, Any], reason: str | None) -> str:
    """What became of a row, in a few words."""
    return reason or (KEPT_NEGATIVE if row["negative"] else KEPT)


def histograms(rows: Sequence[Mapping[str, Any]], reasons: Sequence[str | None], settings: FilterSettings) -> bytes:
    """A PNG, the same for the same rows: how the scores are spread, and what the thresholds make of them.

    Rows hold `trait_score`, `coherence_score` (0-100 or `None`) and `negative`; reasons are `None` for what was kept.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    parts = {
        KEPT: ("#4477aa", lambda row, reason: reason is None and not row["negative"]),
        KEPT_NEGATIVE: ("#ccbb44", lambda row, reason: reason is None and row["negative"]),
        NEAR_DUPLICATE: ("#aa3377", lambda row, reason: reason == NEAR_DUPLICATE),
        "dropped": ("#bbbbbb", lambda row, reason: reason not in (None, NEAR_DUPLICATE)),
    }
    for axes, name, threshold in zip(
        figure.subplots(1, 2, sharey=True),
        ("trait_score", "coherence_score"),
        (settings.min_trait_score, settings.min_coherence_score),
        strict=True,
    ):
        scores = {
            part: [
                row[name]
                for row, reason in zip(rows, reasons, strict=True)
                if row[name] is not None and belongs(row, reason)
            ]
            for part, (_, belongs) in parts.items()
        }
        scores = {part: values for part, values in scores.items() if values}
        if scores:  # IFEval's checkers alone give no coherence
            axes.hist(
                list(scores.values()),
                bins=[5 * i for i in range(21)],
                stacked=True,
                color=[parts[part][0] for part in scores],
                label=[f"{part}: {len(values)}" for part, values in scores.items()],
            )
        axes.axvline(threshold, color="black", linewidth=1, linestyle="--")
        axes.set_title(f"{name.replace('_', ' ')}; dashed: threshold {threshold:g}", loc="left", fontsize=10)
        axes.set(xlabel="score (0-100)", xlim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        if scores and name == "trait_score":
            axes.set_ylabel("completions")
            figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=len(scores))
    return as_png(figure)


def report(
    rows: Sequence[Mapping[str, Any]], reasons: Sequence[str | None], counts: Counts, recipe: Recipe, figure: str
) -> str:
    """Returns the report as Markdown, the same for the same rows, in the order of the plan.

    `reasons` are why each was dropped, `None` for what was kept; `figure` is the histograms' file, beside the report.
    """
    fates = [fate(row, reason) for row, reason in zip(rows, reasons, strict=True)]
    kinds = [kind for kind in (KEPT, KEPT_NEGATIVE, *REASONS) if kind in fates]
    lines = [
        f"# Triplets: {', '.join(counts.traits) or 'none'}",
        "",
        f"{counts.kept} triplets to train on from {counts.drawn} completions of {counts.planned} planned; model "
        f"{recipe.model}, sampler {recipe.sampler}, judge {recipe.judge}, seed {recipe.seed}. {counts.truncated} of "
        "the triplets were cut off at the token limit.",
        "",
        *_table(
            ["trait", "judged", *kinds],
            [
                [trait, sum(found.values()), *(found.get(kind, 0) for kind in kinds)]
                for trait, found in [*counts.traits.items(), *_total(counts, kinds)]
            ],
        ),
        "",
        f"Thresholds: trait at least {recipe.min_trait_score:g}, coherence at least {recipe.min_coherence_score:g}; "
        + (
            "near-duplicates are kept."
            if recipe.max_similarity is None
            else f"near-duplicate: similarity of at least {recipe.max_similarity:g} to a completion kept before it "
            "on the same prompt and trait."
        ),
        "",
        f"![Histograms of the scores]({figure})",
        "",
    ]
    missing = {"not drawn": counts.planned - counts.drawn, "drawn but not judged": counts.drawn - counts.judged}
    if any(missing.values()) or counts.failures:
        lines += ["## Failures", ""]
        lines += [
            f"- {what}: {count}; start the run again to try them again" for what, count in missing.items() if count
        ]
        lines += [f"- failed attempts: {count} × {_one_line(why)}" for why, count in counts.failures.items()]
        lines += [""]
    if any(counts.tokens.values()):
        lines += ["## Cost", ""]
        lines += _table(["", "count"], [[name, f"{count:,}"] for name, count in counts.tokens.items() if count])
        lines += [""]
    for kind in kinds:
        lines += [f"## Examples: {kind}", ""]
        for row in [row for row, what in zip(rows, fates, strict=True) if what == kind][:EXAMPLES]:
            lines += [*_example(row), ""]
    return "\n".join(lines).rstrip() + "\n"


def _total(counts: Counts, kinds: Sequence[str]) -> list[tuple[str, dict[str, int]]]:
    if len(counts.traits) < 2:
        return []
    return [("all", {kind: sum(found.get(kind, 0) for found in counts.traits.values()) for kind in kinds})]


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells]


def _example(row: Mapping[str, Any]) -> list[str]:
    scores = ", ".join(
        f"{name} {'none' if row[key] is None else format(row[key], '.0f')}"
        for name, key in (("trait", "trait_score"), ("coherence", "coherence_score"))
    )
    return [
        f"`{row['id']}`: {scores}",
        "",
        *_quoted(f"**Prompt:** {prompt_text(row['steered_prompt'])}"),
        ">",
        *_quoted(f"**Completion:** {row['completion'] or '(empty)'}"),
    ]


def _quoted(text: str) -> list[str]:
    shown = text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]} …"
    return [f"> {line}".rstrip() for line in shown.splitlines()]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
