"""A run of `psr triplets`: draw, judge, filter, report, in a folder that can be left at any moment and gone on with.

What is drawn and judged goes into append-only journals at once. The files that are the result are made from them at
the end, in the order of the plan, so they do not depend on when the run was stopped or what came first.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_psr.files import as_json_lines, digest, sha256, write_json, write_whole
from peft_psr.hub.facts import package_versions
from peft_psr.training.data.context import Fits, context_length
from peft_psr.training.data.draws import Draw, Failure, PromptPair, Sampler, draws_on
from peft_psr.training.data.filtering import answer_of, has_answer, sort_out
from peft_psr.training.data.triplets import NEGATIVES, STATE, TRIPLETS
from peft_psr.training.judges.base import Judge, Judging, as_judge
from peft_psr.training.progress import Progress
from peft_psr.training.runs.journal import Journal
from peft_psr.training.runs.run_folder import begun_run, check_same_recipe, locked
from peft_psr.training.sampling.local import LocalSampler

from .recipe import Recipe
from .report import Counts, histograms, report


COMPLETIONS, SCORES = "completions.jsonl", "scores.jsonl"
MANIFEST, REPORT, FIGURE = "manifest.json", "report.md", "scores.png"
ORIGIN = ("model", "revision", "template_hash", "template_args")
"""What each record says of where it comes from, as the sampler describes itself."""
TOKENS = ("completion_ids", "reasoning_opened")
"""What a sampler that draws here says of the tokens themselves."""
OF_DRAW = ("completion", "truncated", "seed", *ORIGIN, *TOKENS, "unusable")
"""What a row of the results takes from a draw's record, as far as it is there: older runs said less."""
JUDGE_ORIGIN = (*ORIGIN, "weights_sample", "trait_prompt", "coherence_prompt")
"""What a judge that describes itself must not say otherwise when a run goes on."""
REASONED = (
    "The server keeps the model's reasoning apart from its answer (reasoning_content), so what it gives is not what "
    "was drawn, and can't be trained on. Switch reasoning off, with --template-args '{\"enable_thinking\": false}' if "
    "the model's template knows that, or start the server without its reasoning parser."
)
JUDGED_TOGETHER = 64
"""Completions given to a judge at once, or more to keep a server busy; a kill loses at most their scores."""


class NothingKeptError(ValueError):
    """All completions of a run were dropped."""


class TripletRun:
    """One recipe's run in its folder.

    The folder holds, while the run lasts: `completions.jsonl` and `scores.jsonl`, one line for each outcome, failures
    included; `run.json`, the recipe and what sampler and judges said of themselves. When it is done: `triplets.jsonl`,
    `negatives.jsonl` if the recipe asks for them, `report.md` with `scores.png`, and last of all `manifest.json`.

    Args:
        folder: A new one, or one that a run of the same recipe has left.
        recipe: What to do.
        pairs: The prompts, in the order in which the results are to stand.
        make_sampler: Called only if there is something left to draw.
        make_judge: Gives a trait's judge; called only if there is something left to judge.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        pairs: Sequence[PromptPair],
        make_sampler: Callable[[], Sampler],
        make_judge: Callable[[str], Judging],
    ) -> None:
        self.folder, self.recipe, self.pairs = Path(folder), recipe, list(pairs)
        self.make_sampler, self.make_judge = make_sampler, make_judge
        self.draws = {pair.id: draws_on(pair, recipe.draws, recipe.seed) for pair in self.pairs}
        self._state: dict[str, Any] = {}

    def run(self) -> Counts:
        """Does what is left to do, and writes the results; returns what became of every draw.

        Raises:
            FileExistsError: the folder holds something else.
            BlockingIOError: another process is at work in the folder.
            OSError: the disk is full, for one; nothing is lost.
            NothingKeptError: nothing was kept; the run is done.
            ValueError: the folder's run has another recipe, other prompts or another model; a journal is damaged; or a
                server keeps reasoning back.
        """
        self.check()
        with locked(self.folder):
            self._state = self._begun() or {
                "fixed": self.recipe.fixed(),
                "fixed_hash": self.recipe.fixed_hash(),
                "plan_hash": self._plan_hash(),
                "sampler": None,
                "judges": {},
            }
            self._save_state()
            with Journal(self.folder / COMPLETIONS) as completions, Journal(self.folder / SCORES) as scores:
                self._draw(completions)
                self._judge(completions, scores)
                return self._finish(completions, scores)

    def check(self) -> None:
        """Raises what `run` would raise at its start for the folder; writes nothing."""
        self._begun()

    def _begun(self) -> dict[str, Any]:
        """The state of the run that was begun here, which must be this one; empty if there is none."""
        state = begun_run(self.folder, STATE, "run of psr triplets", ("fixed", "plan_hash"))
        if not state:
            return {}
        check_same_recipe(self.folder, state["fixed"], self.recipe.fixed())
        _name_as_now(state)
        if state["plan_hash"] != self._plan_hash():
            raise ValueError(
                f"The prompts are not those that the run in {self.folder} was begun with: the trait files or the data "
                "set have changed. Put them back to go on with it, or name another folder."
            )
        return state

    def _plan_hash(self) -> str:
        return digest([[p.id, p.trait, p.prompt, p.steered_prompt, p.negative] for p in self.pairs])

    def _save_state(self) -> None:
        write_json(self.folder / STATE, self._state)

    def _draw(self, completions: Journal) -> None:
        done = _successes(completions.records)
        every = [draw for pair in self.pairs for draw in self.draws[pair.id]]
        waiting = [draw for draw in every if draw.id not in done]
        if not waiting:
            return
        sampler = self.make_sampler()
        self._describe_sampler(sampler)
        origin = {name: self._state["sampler"].get(name) for name in ORIGIN}
        pair_of = {draw.id: pair for pair in self.pairs for draw in self.draws[pair.id]}
        fits = None
        if isinstance(sampler, LocalSampler):
            fits = Fits(sampler.processing_class, context_length(sampler.model.config))
        outcomes = sampler(waiting)
        try:
            with Progress("sampling", len(every), len(every) - len(waiting)) as progress:
                for draw, outcome in outcomes:
                    record: dict[str, Any] = {"id": draw.id, "seed": draw.seed, **origin}
                    if isinstance(outcome, Failure):
                        completions.append({**record, "failure": outcome.reason})
                        progress.advance(0, failures=1)
                        continue
                    if outcome.reasoned:
                        raise ValueError(REASONED)
                    tokens = {"prompt_tokens": outcome.prompt_tokens, "completion_tokens": outcome.completion_tokens}
                    drawn: dict[str, Any] = {"completion": outcome.text, "truncated": outcome.truncated, **tokens}
                    drawn |= {} if outcome.ids is None else {"completion_ids": outcome.ids}
                    drawn |= {"reasoning_opened": True} if outcome.opened else {}
                    if fits and (why := fits.reason(pair_of[draw.id], drawn)):
                        drawn["unusable"] = why
                    completions.append({**record, **drawn})
                    progress.advance(tokens=sum(count or 0 for count in tokens.values()))
        finally:
            if close := getattr(outcomes, "close", None):
                close()
        self._describe_sampler(sampler)

    def _describe_sampler(self, sampler: Sampler) -> None:
        """Keep what the sampler says of itself, if it is the one that the run was begun with."""
        now, before = sampler.describe(), self._state["sampler"]
        self._check_same(f"the model {now.get('model')}", before, now, ORIGIN)
        self._state["sampler"] = now
        self._save_state()

    def _describe_judge(self, trait: str, judge: Judge) -> None:
        """The same for the judge of a trait."""
        now, before = judge.describe(), self._state["judges"].get(trait)
        self._check_same(f"the judge of {trait}", before, now, JUDGE_ORIGIN)
        self._state["judges"][trait] = now
        self._save_state()

    def _check_same(self, what: str, before: dict[str, Any] | None, now: dict[str, Any], names: Sequence[str]) -> None:
        for name in names:
            unknown = name == "revision" and before is not None and before.get(name) is None
            if before is not None and not unknown and before.get(name) != now.get(name):
                raise ValueError(
                    f"{name} of {what} is {now.get(name)!r} now, and was {before.get(name)!r} when the run in "
                    f"{self.folder} was begun. Put it back to go on with that run, or name another folder."
                )

    def _judge(self, completions: Journal, scores: Journal) -> None:
        """Score what was drawn, by its bare prompt; what is empty or can't be trained on needs no judge."""
        drawn, judged = _successes(completions.records), _successes(scores.records)
        every = [
            (pair, draw)
            for pair in self.pairs
            for draw in self.draws[pair.id]
            if draw.id in drawn and _needs_judge(drawn[draw.id])
        ]
        waiting: dict[str, list[tuple[PromptPair, Draw]]] = {}
        for pair, draw in every:
            if draw.id not in judged:
                waiting.setdefault(pair.trait, []).append((pair, draw))
        if not waiting:
            return
        left = sum(map(len, waiting.values()))
        chunk = max(JUDGED_TOGETHER, 4 * self.recipe.concurrency if self.recipe.judge_at_server else 0)
        with Progress("judging", len(every), len(every) - left) as progress:
            for trait, entries in waiting.items():
                judge = as_judge(self.make_judge(trait))
                self._describe_judge(trait, judge)
                for start in range(0, len(entries), chunk):
                    self._judge_some(judge, entries[start : start + chunk], drawn, scores, progress)
                self._describe_judge(trait, judge)

    def _judge_some(
        self,
        judge: Judge,
        entries: Sequence[tuple[PromptPair, Draw]],
        drawn: dict[str, dict[str, Any]],
        scores: Journal,
        progress: Progress,
    ) -> None:
        spent = dict(judge.usage)
        usage: dict[str, int] = {}
        try:
            pairs = [pair for pair, _ in entries]
            texts = [answer_of(drawn[draw.id]) or "" for _, draw in entries]  # those without one are not asked about
            results = judge.score([pair.prompt for pair in pairs], texts, pairs)
        finally:  # what a judge spent before it failed is spent
            usage = {name: count - spent.get(name, 0) for name, count in judge.usage.items()}
            if any(usage.values()):
                scores.append({"usage": usage})
        for (_, draw), result in zip(entries, results, strict=True):
            scores.append(
                {"id": draw.id, "failure": result.failure}
                if result.failure is not None
                else {"id": draw.id, "trait_score": result.trait, "coherence_score": result.coherence}
            )
        failures = sum(result.failure is not None for result in results)
        tokens = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
        progress.advance(len(results) - failures, tokens, failures)

    def _finish(self, completions: Journal, scores: Journal) -> Counts:
        """Write the results from the journals, and the manifest when all else is there."""
        drawn, judged = _successes(completions.records), _successes(scores.records)
        rows = [
            {
                "id": draw.id,
                "trait": pair.trait,
                "prompt": pair.prompt,
                "steered_prompt": pair.steered_prompt,
                "negative": pair.negative,
                **{name: drawn[draw.id][name] for name in OF_DRAW if name in drawn[draw.id]},
                **{name: judged.get(draw.id, {}).get(name) for name in ("trait_score", "coherence_score")},
            }
            for pair in self.pairs
            for draw in self.draws[pair.id]
            if draw.id in drawn and (draw.id in judged or not _needs_judge(drawn[draw.id]))
        ]
        reasons = sort_out(rows, self.recipe.filter)
        counts = Counts.of(
            rows,
            reasons,
            planned=sum(map(len, self.draws.values())),
            completion_records=completions.records,
            score_records=scores.records,
        )
        (self.folder / MANIFEST).unlink(missing_ok=True)
        left = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        files = {TRIPLETS: [row for row in left if not row["negative"]]}
        if self.recipe.negatives:
            files[NEGATIVES] = [row for row in left if row["negative"]]
        hashes = {}
        for name, kept in files.items():
            content = as_json_lines(kept)
            write_whole(self.folder / name, content)
            hashes[name] = {"rows": len(kept), "sha256": sha256(content)}
        write_whole(self.folder / FIGURE, histograms(rows, reasons, self.recipe.filter))
        write_whole(self.folder / REPORT, report(rows, reasons, counts, self.recipe, FIGURE))
        manifest = {
            "schema": 1,
            "recipe": self.recipe.model_dump(mode="json"),
            **{name: self._state[name] for name in ("fixed_hash", "plan_hash", "sampler", "judges")},
            "counts": asdict(counts),
            "files": hashes,
            "versions": package_versions(),
        }
        write_json(self.folder / MANIFEST, manifest)
        if not files[TRIPLETS]:
            raise NothingKeptError(
                f"None of {counts.drawn} completions was kept ({counts.why()}). See {self.folder / REPORT}: "
                "the instructions may not bring the trait out, or the judge may not know it."
            )
        return counts


def _name_as_now(state: dict[str, Any]) -> None:
    """Bring what a run up to version 0.1.0 has written down to the names of today."""
    for judge in state["judges"].values():
        if "chat_template_hash" in judge:
            judge["template_hash"] = judge.pop("chat_template_hash")
    sampler = state["sampler"] or {}
    if args := sampler.get("extra_body", {}).get("chat_template_kwargs"):
        sampler.setdefault("template_args", args)


def _successes(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{id: record} of what has come off; failures are tried again."""
    return {record["id"]: record for record in records if "id" in record and "failure" not in record}


def _needs_judge(record: dict[str, Any]) -> bool:
    return has_answer(record) and "unusable" not in record
