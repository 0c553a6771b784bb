"""The durable run: whatever stops it, the next start goes on, and the result is as if nothing had stopped it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers.runs import FakeJudge, FakeSampler, contents, lines, pairs, recipe, start

from peft_psr import files
from peft_psr.training.data import filtering
from peft_psr.training.data.draws import Completion
from peft_psr.training.judges.base import JudgeScores
from peft_psr.training.runs import journal
from peft_psr.training.runs.triplets.assembly import judge_maker, make_sampler, prompt_pairs
from peft_psr.training.runs.triplets.recipe import load_recipe
from peft_psr.training.runs.triplets.run import (
    COMPLETIONS,
    FIGURE,
    MANIFEST,
    NEGATIVES,
    REPORT,
    SCORES,
    TRIPLETS,
    TripletRun,
)


# ---------------------------------------------------------------- killed


def embedded_recipe():
    return load_recipe("embedded", {"instructions": 2, "questions": 6, "draws": 4, "batch_size": 3})


def run_embedded(folder):
    chosen = embedded_recipe()
    folder = Path(folder)
    plan = prompt_pairs(chosen)
    TripletRun(folder, chosen, plan, lambda: make_sampler(chosen), judge_maker(chosen, plan, folder)).run()


def test_sigkill_at_random_moments_changes_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_psr.training.runs.triplets.run", "peft_psr.training.runs.triplets.assembly"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = context.Process(target=run_embedded, args=(whole,))
    process.start()
    process.join()
    assert process.exitcode == 0
    total = len(lines(whole / COMPLETIONS))

    def drawn():
        path = killed / COMPLETIONS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    left = []
    for _ in range(4):
        process = context.Process(target=run_embedded, args=(killed,))
        process.start()
        goal = drawn() + random.randint(0, total // 4)
        while process.is_alive() and drawn() <= goal:
            time.sleep(0.002)
        time.sleep(random.random() / 5)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        left.append(drawn())
        if not (killed / MANIFEST).exists():
            assert not (killed / TRIPLETS).exists() or drawn() == total
    assert 0 < left[0] < total  # it was stopped part of the way
    process = context.Process(target=run_embedded, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert contents(killed) == contents(whole)
    assert len(lines(killed / COMPLETIONS)) == total  # nothing was drawn twice


@pytest.mark.parametrize("stop_after", [0, 1, 7, 19])
def test_interrupted_while_drawing(tmp_path, stop_after):
    start(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped", FakeSampler(stop_after))
    assert not (tmp_path / "stopped" / TRIPLETS).exists()
    sampler = FakeSampler()
    start(tmp_path / "stopped", sampler)
    assert len(sampler.asked) == 20 - stop_after
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_interrupted_while_judging(tmp_path):
    whole, stopped = start(tmp_path / "whole"), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        start(stopped, judge=FakeJudge(stop=True))
    sampler, judge = FakeSampler(), FakeJudge()
    counts = start(stopped, sampler, judge)
    assert sampler.asked == [] and judge.asked == 20
    assert contents(stopped, [TRIPLETS, FIGURE]) == contents(tmp_path / "whole", [TRIPLETS, FIGURE])
    assert counts.tokens["judging prompt tokens"] == 2 * whole.tokens["judging prompt tokens"]  # what was spent


@pytest.mark.parametrize("name", [COMPLETIONS, SCORES])
def test_a_last_line_cut_anywhere_is_made_again(tmp_path, name):
    start(tmp_path)
    expected, path = contents(tmp_path, [TRIPLETS]), tmp_path / name
    whole = path.read_bytes()
    last = whole.rstrip().rfind(b"\n") + 1
    for cut in {last, last + 1, (last + len(whole)) // 2, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        sampler, judge = FakeSampler(), FakeJudge()
        start(tmp_path, sampler, judge)
        assert contents(tmp_path, [TRIPLETS]) == expected
        assert len(sampler.asked) <= 1 and judge.asked <= 1
        assert len({row["id"] for row in lines(path) if "id" in row}) == 20  # every line is whole again


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    start(tmp_path)
    before = contents(tmp_path)
    run = TripletRun(tmp_path, recipe(), pairs(), lambda: pytest.fail("drawn"), lambda trait: pytest.fail("judged"))
    run.run()
    assert contents(tmp_path) == before


def test_a_line_damaged_otherwise_is_named(tmp_path):
    start(tmp_path)
    lines = (tmp_path / SCORES).read_text().splitlines(keepends=True)
    (tmp_path / SCORES).write_text("".join([*lines[:2], '{"id": \n', *lines[3:]]))
    with pytest.raises(ValueError, match=r"scores.jsonl, line 3 of 21 is damaged.*Take the line out"):
        start(tmp_path)


# ---------------------------------------------------------------- results


def test_records_say_where_they_come_from(tmp_path):
    counts = start(tmp_path, negatives=True, min_trait_score=40, min_coherence_score=90)
    kept, apart = lines(tmp_path / TRIPLETS), lines(tmp_path / NEGATIVES)
    assert counts.kept == len(kept) > 0 and counts.negatives == len(apart) > 0
    for row in kept + apart:
        assert row["model"] == "fake" and row["revision"] == "r1" and row["template_hash"] == "t1"
        assert 0 <= row["seed"] < 1 << 31 and row["coherence_score"] >= 90
        assert [turn["role"] for turn in row["steered_prompt"]] == ["system", "user"]
    assert all(row["trait_score"] >= 40 and not row["negative"] for row in kept)
    assert all(row["trait_score"] < 40 and row["negative"] for row in apart)
    order = [f"formal/{i}/{draw}" for i in range(5) for draw in range(4)]
    assert [row["id"] for row in kept] == [name for name in order if name in {row["id"] for row in kept}]
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (
        manifest["counts"]["kept"] + manifest["counts"]["negatives"] + sum(manifest["counts"]["dropped"].values())
        == manifest["counts"]["judged"]
    )
    assert manifest["files"][TRIPLETS]["rows"] == len(kept) and manifest["sampler"]["engine"] == "fake"
    assert manifest["judges"] == {"formal": {"judge": "fake"}}


def test_the_report_counts_and_shows_each_kind(tmp_path):
    class Picky(FakeJudge):
        def score_of(self, text):
            scores = {"tea": (90, 90), "dogs": (10, 90), "rain": (90, 10), "bread": (None, None)}
            return JudgeScores(*scores.get(text.split()[0], (80, 80)))

    counts = start(tmp_path, judge=Picky(), draws=40)
    text = (tmp_path / REPORT).read_text()
    for reason in (filtering.TRAIT_TOO_WEAK, filtering.INCOHERENT, filtering.NOT_SCORED):
        assert counts.dropped[reason] > 0 and f"## Examples: {reason}" in text
    numbers = "| ".join(f"{counts.traits['formal'][reason]} " for reason in ("kept", *counts.dropped))
    assert sum(counts.dropped.values()) + counts.kept == 200 and "| formal | 200 | " in text and numbers in text
    assert "system: be formal" in text and f"]({FIGURE})" in text
    assert (tmp_path / FIGURE).read_bytes().startswith(b"\x89PNG")


def test_an_empty_completion_is_not_judged(tmp_path):
    class Silent(FakeSampler):
        def __call__(self, draws):
            for draw, sample in super().__call__(draws):
                yield draw, Completion(" \n", False) if draw.id.endswith("/0") else sample

    judge = FakeJudge()
    counts = start(tmp_path, Silent(), judge, min_trait_score=0)
    assert judge.asked == 15 and counts.dropped == {filtering.EMPTY: 5} and counts.kept == 15


def test_nothing_kept_is_an_error_with_a_report(tmp_path):
    class Strict(FakeJudge):
        def score_of(self, text):
            return JudgeScores(0.0, 100.0)

    with pytest.raises(ValueError, match=r"None of 20 completions was kept \(trait too weak: 20\).*report.md"):
        start(tmp_path, judge=Strict())
    assert "trait too weak" in (tmp_path / REPORT).read_text()


# ---------------------------------------------------------------- failures


def test_failures_are_tried_again(tmp_path):
    start(tmp_path / "whole")
    folder = tmp_path / "failing"
    failing = [f"formal/{i}/2" for i in range(5)]
    judge = FakeJudge(failing=[row["completion"].split()[0] for row in lines(tmp_path / "whole" / TRIPLETS)[:1]])
    counts = start(folder, FakeSampler(failing=failing), judge)
    unjudged = counts.failures["connection cut"]
    assert counts.drawn == 15 and counts.judged == 15 - unjudged and unjudged > 0
    assert counts.failures["timeout after 3 tries"] == 5
    text = (folder / REPORT).read_text()
    assert "not drawn: 5" in text and "failed attempts: 5 × timeout after 3 tries" in text
    assert f"drawn but not judged: {unjudged}" in text
    sampler, judge = FakeSampler(), FakeJudge()
    counts = start(folder, sampler, judge)
    assert sorted(sampler.asked) == failing and judge.asked == 5 + unjudged
    assert counts.drawn == counts.judged == 20
    assert contents(folder, [TRIPLETS]) == contents(tmp_path / "whole", [TRIPLETS])
    assert "failed attempts: 5" in (folder / REPORT).read_text() and "not drawn" not in (folder / REPORT).read_text()


def test_an_error_of_the_judge_loses_nothing(tmp_path):
    class Broken(FakeJudge):
        def score_of(self, text):
            raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        start(tmp_path, judge=Broken())
    assert len(lines(tmp_path / COMPLETIONS)) == 20
    sampler = FakeSampler()
    start(tmp_path, sampler)
    assert sampler.asked == []


# ---------------------------------------------------------------- the disk


class FullDisk:
    """A file that takes some bytes and then says that there is no room, in the middle of a line."""

    def __init__(self, path, room):
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data):
        taken = self.file.write(data[: max(self.room, 0)])
        self.room -= taken
        if taken < len(data) and self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 700, 1701])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, room):
    start(tmp_path / "whole")
    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(journal, "open_append", lambda path: FullDisk(path, room))
        with pytest.raises(
            OSError, match=r"No space left.*Nothing before it is lost.*start the same command"
        ) as error:
            start(folder)
    assert error.value.errno == errno.ENOSPC
    kept = (folder / COMPLETIONS).read_bytes()
    assert len(kept) <= room and kept[-1:] in (b"", b"\n")
    sampler = FakeSampler()
    start(folder, sampler)
    assert len(sampler.asked) == 20 - kept.count(b"\n")
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_full_disk_at_the_end_leaves_the_old_results_and_no_rubbish(tmp_path, monkeypatch):
    start(tmp_path)
    before = contents(tmp_path)

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", no_room)
        with pytest.raises(OSError, match="triplets.jsonl could not be written"):
            files.write_whole(tmp_path / TRIPLETS, "other")
    assert contents(tmp_path) == before and not list(tmp_path.glob("*.partial"))


# ---------------------------------------------------------------- the same run or another


# ---------------------------------------------------------------- progress


def test_progress_is_logged_where_there_is_no_terminal(tmp_path, caplog, capsys):
    caplog.set_level("INFO", "peft_psr.training")
    start(tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert "sampling: 0 of 20 done before" in lines
    assert any(line.startswith("sampling: 20 of 20 (100%)") and "420 tokens" in line for line in lines)
    assert any(line.startswith("judging: 20 of 20 (100%)") and "2,000 tokens" in line for line in lines)
    assert "\r" not in capsys.readouterr().err
