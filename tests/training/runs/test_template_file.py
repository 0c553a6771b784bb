"""`--chat-template FILE`: a run goes on with the template that it was begun with, wherever its file lies."""

from __future__ import annotations

import pytest
from helpers.runs import FakeJudge, FakeSampler, make_files, make_recipe, pairs, recipe
from helpers.tokenizers import CHAT_TEMPLATE

from peft_psr.training.runs.train.run import TrainRun
from peft_psr.training.runs.triplets.run import TripletRun


def test_a_template_file_may_move_and_must_not_change(tmp_path):
    made, file, moved = make_files(tmp_path), tmp_path / "a.jinja", tmp_path / "b.jinja"

    def start(template):
        drawn = recipe(chat_template=str(template))
        TripletRun(tmp_path / "drawn", drawn, pairs(), FakeSampler, lambda trait: FakeJudge()).run()
        used = make_recipe(made, chat_template=str(template), epochs=1, traits="kind", layers_to_transform=0)
        TrainRun(tmp_path / "trained", used).run()

    file.write_text(CHAT_TEMPLATE)
    moved.write_text(CHAT_TEMPLATE)
    start(file)
    start(moved)
    file.write_text(CHAT_TEMPLATE.replace("</t>", "</t> </t>"))
    for run in (
        TripletRun(tmp_path / "drawn", recipe(chat_template=str(file)), pairs(), FakeSampler, FakeJudge),
        TrainRun(tmp_path / "trained", make_recipe(made, chat_template=str(file), epochs=1, traits="kind")),
    ):
        with pytest.raises(ValueError, match="begun with another recipe .*chat_template: '[0-9a-f]{16}' -> "):
            run.check()
