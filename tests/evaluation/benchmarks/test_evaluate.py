"""`psr evaluate`: recipes, the folder that finds again what it has done, the persona benchmark, the command."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
import torch
from helpers.commands import psr
from helpers.unruly_server import MODEL, UnrulyServer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_psr import cli, tiny_chat_path
from peft_psr.evaluation import evaluate_persona
from peft_psr.evaluation.benchmarks import workbench
from peft_psr.evaluation.benchmarks.cell import Cell
from peft_psr.evaluation.benchmarks.persona import benchmark as persona_benchmark
from peft_psr.evaluation.benchmarks.persona.benchmark import check_persona, run_persona
from peft_psr.evaluation.benchmarks.persona.recipe import PersonaRecipe
from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.tiny_chat import instructions, questions


SMALL = {
    "source": "embedded", "models": "embedded", "judge": "grammar", "traits": "pirate", "methods": "S-Const DiM",
    "positions": "question_and_response", "instructions": 1, "questions": 3, "draws": 2, "score_draws": 2,
    "strengths": "1,8", "calibration_steps": 1, "max_new_tokens": 60, "min_trait_score": 0, "min_coherence_score": 0,
}  # fmt: skip
PIRATE = ("matey", "timbers", "Ahoy", "Yo ho", "plank", "sails", "Fair winds", "rum", "aye", "thunder", "hearty")
DIM = Cell("embedded", "pirate", "S-Const DiM", 0)
IDS = torch.arange(5, 17)[None]

USER = [{"role": "user", "content": "Is tea good?"}]


def bench_in(folder, **options):
    return Workbench(load_evaluate_recipe(PersonaRecipe, None, SMALL | options), folder, "persona")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "S-PSR"}, "no method 'S-PSR'; there are: S-Const DiM.*Did you mean"),
        ({"adapters": {"prompt": "x"}}, "'prompt' is what a method is called"),
        ({"adapters": {"mine": "x/{seed}"}}, "may hold {trait} and no other"),
        ({"triplets": "t.jsonl", "models": "a,b"}, "triplets are of one model"),
        ({"seeds": ""}, "seeds: '' is wrong"),
        ({"judge": "server", "judge_model": "j"}, "needs judge_url"),
        ({"strengths": "0"}, "strengths"),
        ({"source": "ifeval", "judge": "server", "judge_model": "j"}, "needs data"),
    ],
)
def test_what_a_recipe_refuses(options, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        load_evaluate_recipe(PersonaRecipe, None, SMALL | options)


def test_all_and_no_methods():
    assert load_evaluate_recipe(PersonaRecipe, None, SMALL | {"methods": "all"}).methods == tuple(METHODS)
    assert load_evaluate_recipe(PersonaRecipe, None, SMALL | {"methods": "none"}).methods == ()


# ---------------------------------------------------------------- the folder


def test_a_cell_is_computed_once_for_its_parameters_and_recipe(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"n": len(calls)}

    def broken():
        raise KeyError("stopped")

    bench = bench_in(tmp_path / "run")
    with bench.open():
        with pytest.raises(KeyError):
            bench.cell({"seed": 0}, broken)
        assert bench.cell({"seed": 0}, compute) == {"n": 1} == bench.cell({"seed": 0}, compute)
        assert bench.cell({"seed": 1}, compute) == {"n": 2}
    again = bench_in(tmp_path / "run", seeds="0,1", traits="pirate,formal")  # a matrix may grow
    with again.open():
        assert again.cell({"seed": 0}, compute) == {"n": 1}
    with pytest.raises(ValueError, match="begun with another recipe .*score_draws: 2 -> 3"):
        bench_in(tmp_path / "run", score_draws=3).check()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="holds no run of psr evaluate"):
        bench_in(tmp_path / "other").check()


def test_an_adapter_is_made_once_and_found_again(tmp_path, monkeypatch):
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_chat_path()).eval())
    with pytest.raises(ValueError, match="adapters: 'mine' is not to be had from .*pirate"):
        bench_in(tmp_path / "run", adapters={"mine": str(tmp_path / "{trait}")}).check()
    bench = bench_in(tmp_path / "run")
    with bench.open(), bench.fitted(DIM) as fitted:
        edited = logits(fitted.model)
        assert fitted.bytes > 500 and fitted.seconds > 0 and not torch.equal(edited, base)
        fitted.model.save_pretrained(str(tmp_path / "pirate"))
    bench = bench_in(tmp_path / "run", adapters={"mine": str(tmp_path / "{trait}")})
    with bench.open():
        model, _ = bench.load("embedded")
        assert torch.equal(logits(model), base)
        with bench.fitted(replace(DIM, method="mine")) as given:
            assert torch.equal(logits(given.model), edited)
        fewer = bench.triplets("embedded", "pirate")[:2]
        with bench.fitted(DIM, fewer, "half") as other:
            assert not torch.equal(logits(other.model), edited)
    monkeypatch.setattr(workbench, "METHODS", {})  # whoever makes an adapter now fails
    again = bench_in(tmp_path / "run")
    with again.open(), again.fitted(DIM) as found:
        assert torch.equal(logits(found.model), edited) and found.bytes == fitted.bytes
        with pytest.raises(KeyError), again.fitted(replace(DIM, seed=1)):
            pass


def test_nothing_held_out_is_trained_on(tmp_path):
    bench = bench_in(tmp_path / "run")
    with bench.open():
        train, held_out = bench.triplets("embedded", "pirate"), bench.held_out("embedded", "pirate")
        for field in ("prompt", "steered_prompt"):
            assert not {str(row[field]) for row in train} & {str(row[field]) for row in held_out}
        assert {str(row["prompt"]) for row in held_out} == {str(pair.prompt) for pair in bench.pairs("test")["pirate"]}


def test_given_triplets_that_can_not_be_used_are_left_out(tmp_path, caplog):
    steered = [{"role": "system", "content": "be a pirate"}, *USER]
    good = {"prompt": USER, "steered_prompt": steered, "completion": "arr", "trait_score": 90.0, "trait": "pirate"}
    lines = [*[json.dumps(good)] * 3, "{", json.dumps(good | {"prompt": [{"role": "user", "content": None}]})]
    file = tmp_path / "given.jsonl"
    file.write_text("\n".join(lines))
    bench = bench_in(tmp_path / "out", triplets=str(file), traits="pirate")
    bench.check()
    assert bench.triplets("embedded", "pirate") == [good] * 3
    assert "2 of 'pirate' are left out" in caplog.text and "line 4" in caplog.text
    file.write_text("\n".join(lines[2:]))
    with pytest.raises(ValueError, match="can't be used"):
        bench_in(tmp_path / "out2", triplets=str(file), traits="pirate").check()


def test_triplets_given(tmp_path):
    bench = bench_in(tmp_path / "run")
    with bench.open():
        drawn = bench.triplets("embedded", "pirate")
    folder = next((tmp_path / "run" / "triplets").glob("*/pirate"))
    given = bench_in(tmp_path / "second", triplets=str(folder))
    with given.open():
        assert given.triplets("embedded", "pirate") == drawn
    with pytest.raises(ValueError, match="has no 'formal'"):
        bench_in(tmp_path / "third", triplets=str(folder), traits="formal").check()


# ---------------------------------------------------------------- personas


def test_persona_numbers_are_those_of_the_answers_and_a_rerun_measures_nothing(tmp_path, monkeypatch):
    bench = bench_in(tmp_path / "run")
    check_persona(bench)
    with bench.open():
        report = run_persona(bench)
    plain, prompted, method = report.results["cells"]
    assert [cell["method"] for cell in report.results["cells"]] == ["none", "prompt", "S-Const DiM"]
    assert plain["alpha1"]["trait"] < 10 < prompted["alpha1"]["trait"]
    for cell in (plain, prompted, method):
        answers = [answer for question in cell["by_question"]["alpha1"] for answer in question]
        assert len(answers) == 3 * 2  # questions x draws
        assert statistics.fmean(a[0] for a in answers) == pytest.approx(cell["alpha1"]["trait"], abs=1e-2)
        assert statistics.fmean(a[1] for a in answers) == pytest.approx(cell["alpha1"]["coherence"], abs=1e-2)
        row = report.tables[0].rows[cell["method"]]
        assert row["trait"].mean == pytest.approx(cell["alpha1"]["trait"], abs=1e-2)
        assert row["coherence"].low <= row["coherence"].mean <= row["coherence"].high
    assert {point["alpha"] for point in method["curve"]} >= {1.0, 8.0}
    for place in ("c80", "cp"):
        assert (method[place]["alpha"] is None) == (place not in method["by_question"])
    example = method["example"]
    gates = torch.tensor(list(example["gates"].values()))
    assert gates.shape == (1, len(example["tokens"])) and (gates == 1).all()  # a constant gate of one layer
    assert example["tokens"][0] == "<|assistant|>" and len(example["tokens"]) <= persona_benchmark.SHOWN
    moved = torch.tensor(example["adapter"])
    assert moved.shape == (6, len(example["tokens"])) and (moved[:2] == 0).all() and (moved[2:] > 0).all()
    assert {name.split("_")[0] for name in report.figures} == {"curve", "rmse", "strength", "gates"}
    assert [sample.answers.keys() for sample in report.samples] == [{"none", "prompt", "S-Const DiM"}] * 2

    def no_sampling(*args, **settings):
        raise AssertionError("measured again")

    monkeypatch.setattr(persona_benchmark, "judged_answers", no_sampling)
    again = bench_in(tmp_path / "run")
    with again.open():
        assert run_persona(again).results["cells"] == report.results["cells"]


def write_seadog(folder, skip=0):
    """A pirate under another name, in the Persona Vectors layout."""
    for name, side in {"trait_data_extract": "train", "trait_data_eval": "test"}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        trait = {
            "instruction": [{"pos": text, "neg": "Answer plainly."} for text in instructions("pirate", side)[:1]],
            "questions": [question.text for question in questions(side)[skip : skip + 3]],
            "eval_prompt": "Is it a pirate's? Question: {question} Answer: {answer} Reply with a number.",
        }
        (folder / name / "seadog.json").write_text(json.dumps(trait))


def seadog(folder, **options):
    settings = {"source": "personas", "data": str(folder / "data"), "traits": "seadog", "judge": "server",
                "judge_model": MODEL, "instructions": None, "questions": None}  # fmt: skip
    return bench_in(folder / "run", **settings | options)


def test_other_questions_in_the_same_file_are_measured_anew(tmp_path):
    calls = []
    for skip in (0, 0, 3):
        write_seadog(tmp_path / "data", skip)
        bench = seadog(tmp_path, judge_url="http://localhost:1/v1")
        with bench.open():
            bench.cell({"trait": "seadog"}, lambda: calls.append(1) or {})
    assert len(calls) == 2


def test_a_judge_that_fails_is_asked_again(tmp_path):
    write_seadog(tmp_path / "data")
    settings = {"methods": "none", "max_failure_share": 0.9, "concurrency": 1}
    broken = UnrulyServer(
        lambda body, attempt: "422" if len(broken.bodies) % 3 == 2 else "ok", reply=lambda body: "90"
    )
    with broken:
        bench = seadog(tmp_path, **settings, judge_url=broken.url)
        with bench.open(), pytest.raises(ConnectionError, match="failed on .* asks again"):
            run_persona(bench)
    with UnrulyServer(reply=lambda body: "90") as server:
        bench = seadog(tmp_path, **settings, judge_url=server.url)
        with bench.open():
            cells = run_persona(bench).results["cells"]
    assert all(cell["unscored"] == [0, 6] for cell in cells)


def test_traits_in_a_local_folder_judged_by_a_server(tmp_path):
    """The Persona Vectors layout, as a data set on the Hub has it; the judge counts pirate's words."""
    write_seadog(tmp_path / "data")

    def grade(body):
        asked = body["messages"][-1]["content"]
        if "Is it a pirate's?" not in asked:
            return "90"
        return "100" if any(word in asked.split("Answer:")[1] for word in PIRATE) else "0"

    options = {"methods": "A-PSR MSE ridge", "epochs": 2}
    with UnrulyServer(reply=grade) as server:
        bench = seadog(tmp_path, **options, judge_url=server.url)
        check_persona(bench)
        with bench.open():
            cells = run_persona(bench).results["cells"]
        asked = len(server.bodies)
        again = seadog(tmp_path, **options, judge_url=server.url)
        with again.open():
            assert run_persona(again).results["cells"] == cells and len(server.bodies) == asked
    plain, prompted, steered = (cell["alpha1"] for cell in cells)
    assert plain["trait"] == 0 and plain["coherence"] == 90
    assert prompted["trait"] > 50 and steered["trait"] > 50
    shown = [body["messages"][-1]["content"] for body in server.bodies]
    assert not any(instructions("pirate", "test")[0] in text for text in shown), "the judge saw the instruction"


def test_persona_refuses_sources_without_held_out_questions(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({
        "prompt": "Say hi. No commas.", "prompt_without_instruction": "Say hi.",
        "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
    }))  # fmt: skip
    options = {"source": "ifeval", "judge": "ifeval", "data": str(rows), "traits": "", "instructions": None}
    options["positions"] = "response"
    with pytest.raises(ValueError, match="psr evaluate ifeval"):
        check_persona(bench_in(tmp_path / "run", **options))


# ---------------------------------------------------------------- the command


def test_as_a_function(tmp_path):
    report = evaluate_persona(tmp_path / "run", **SMALL | {"methods": "none"})
    assert list(report.tables[0].rows) == ["none", "prompt"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["results"]["cells"] == report.results["cells"]
    with pytest.raises(ValueError, match="grumpy"):
        evaluate_persona(tmp_path / "run", **SMALL | {"traits": "grumpy"})


def test_the_command(tmp_path):
    recipe = tmp_path / "small.json"  # YAML reads JSON
    recipe.write_text(json.dumps(SMALL))
    planned = psr("evaluate", "persona", recipe, "--output", tmp_path / "run", "--dry-run")
    assert planned.exit_code == 0 and "would measure S-Const DiM" in planned.output and "pirate" in planned.output
    assert not (tmp_path / "run").exists()
    done = psr("evaluate", "persona", recipe, "--output", tmp_path / "run", "--methods", "none")
    assert done.exit_code == 0, done.output
    assert {"results.json", "table.md", "report.html", "run.json", "cells"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["recipe"]["traits"] == ["pirate"]
    wrong = psr("evaluate", "persona", recipe, "--output", tmp_path / "run", "--traits", "grumpy")
    assert wrong.exit_code == 2 and "grumpy" in wrong.output and "sycophantic" in wrong.output
    listed = CliRunner().invoke(cli.app, ["methods"])
    assert listed.exit_code == 0 and "A-PSR MSE" in listed.output
