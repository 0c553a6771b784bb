"""Runs that an older version has begun go on, and what it has finished stays as it is."""

from __future__ import annotations

import json

from helpers.runs import FakeJudge, FakeSampler, pairs, recipe

from peft_psr.training.runs.triplets.run import COMPLETIONS, TRIPLETS, TripletRun


def test_a_finished_run_from_before_template_arguments_stays_byte_for_byte(tmp_path):
    run = TripletRun(tmp_path, recipe(), pairs(), FakeSampler, lambda trait: FakeJudge())
    run.run()

    def without_args(name):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert all(row.pop("template_args", None) is None for row in rows)
        (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return (tmp_path / name).read_bytes()

    without_args(COMPLETIONS)
    before = without_args(TRIPLETS)
    TripletRun(tmp_path, recipe(), pairs(), FakeSampler, lambda trait: FakeJudge()).run()
    assert (tmp_path / TRIPLETS).read_bytes() == before  # else psr train, begun on them, would refuse them
