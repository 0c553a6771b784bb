"""`psr evaluate axbench`: the choice of the factor, the report, and all of it on the embedded model."""

from __future__ import annotations

import json
import random
import statistics

import pytest
import torch
from helpers.axbench import by_rule, recipe_in, write_data
from helpers.unruly_server import UnrulyServer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_psr import tiny_chat_path
from peft_psr.evaluation.benchmarks.axbench import benchmark as axbench_benchmark
from peft_psr.evaluation.benchmarks.axbench.benchmark import (
    check_axbench,
    run_axbench,
    trials,
    tried_out,
)
from peft_psr.evaluation.benchmarks.axbench.questions import Trial
from peft_psr.evaluation.benchmarks.axbench.recipe import AxBenchRecipe
from peft_psr.evaluation.benchmarks.axbench.report import axbench_report
from peft_psr.evaluation.benchmarks.cell import Cell
from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.reports.report_files import write_report
from peft_psr.training.data.by_trait import folder_name
from peft_psr.training.data.draws import Completion, draw_seed
from peft_psr.training.judges.ratings import PROMPTS, Ratings
from peft_psr.training.sampling.local import sample_completions
from peft_psr.training.sources.axbench import CONCEPT_INSTRUCTION, Concept


# ---------------------------------------------------------------- the choice of the factor


SEA = Trial(Concept(0, "of tea", (), (), ()), ("c1", "c2"), ("s1", "s2", "s3"))
LAND = Trial(Concept(7, "of dogs", (), (), ()), ("c3", "c1"), ("s1", "s4", "s5"))


def rate(scores):
    """A judge that gives all three ratings by (concept, instruction, answer), or none."""

    def judge(asked):
        found = [scores(*each) for each in asked]
        return [
            Ratings({}, {"fluency": "?"}) if rating is None else Ratings(dict.fromkeys(PROMPTS, rating))
            for rating in found
        ]

    return judge


def echo(tasks):
    return [Completion(f"{task.factor}", False) for task in tasks]


def test_the_factor_is_chosen_on_one_half_and_scored_on_the_other():
    def scores(concept, instruction, answer):
        if instruction.startswith("c"):
            return {"of tea": {"0.5": 1, "1.0": 2, "2.0": 2}, "of dogs": {"0.5": 2, "1.0": 0, "2.0": 0}}[concept][
                answer
            ]
        return 0 if instruction == "s1" else 1

    seen = []
    cells = tried_out(
        [SEA, LAND], (0.5, 1.0, 2.0), lambda tasks: seen.append(list(tasks)) or echo(tasks), rate(scores)
    )
    assert cells[0]["factor"] == 1.0 and cells[7]["factor"] == 0.5  # of equally good ones the smaller
    assert cells[0]["curve"] == [(0.5, 1.0, 2), (1.0, 2.0, 2), (2.0, 2.0, 2)]
    assert [(row["instruction"], row["factor"], row["score"]) for row in cells[7]["scoring"]] == [
        ("s1", 0.5, 0.0),
        ("s4", 0.5, 1.0),
        ("s5", 0.5, 1.0),
    ]
    choosing, scoring = seen
    assert len(choosing) == 2 * 3 * 2 and {task.instruction for task in choosing} == {"c1", "c2", "c3"}
    assert {task.place for task in choosing} == {0, 1} and [task.place for task in scoring] == [2, 3, 4] * 2


def test_answers_without_a_score_are_left_out_and_not_counted_as_naught():
    def scores(concept, instruction, answer):
        if concept == "of dogs":
            return None
        return {"0.5": {"c1": None, "c2": 2}, "1.0": {"c1": 1, "c2": 2}}[answer].get(instruction, 2)

    cells = tried_out([SEA, LAND], (0.5, 1.0), echo, rate(scores))
    assert cells[0]["factor"] == 0.5 and cells[0]["curve"] == [(0.5, 2.0, 1), (1.0, 1.5, 2)]
    assert cells[7]["factor"] is None and cells[7]["scoring"] == [] and len(cells[7]["choosing"]) == 4


def test_reasoning_that_came_to_no_answer_is_not_rated():
    def thinking(tasks):
        return [Completion("<think>so" if task.factor == 0.5 else "<think>so</think>tea", False) for task in tasks]

    seen = []
    cells = tried_out([SEA], (0.5, 1.0), thinking, rate(lambda *each: seen.append(each[2]) or 2))
    assert set(seen) == {"tea"} and cells[0]["curve"] == [(0.5, None, 0), (1.0, 2.0, 2)]
    assert [row["unread"] for row in cells[0]["choosing"] if row["factor"] == 0.5] == [
        dict.fromkeys(PROMPTS, "reasoning without an answer")
    ] * 2


def test_without_an_adapter_there_is_no_factor():
    cells = tried_out([SEA], (), echo, rate(lambda *each: 2))
    assert cells[0]["factor"] is None and cells[0]["choosing"] == [] and cells[0]["curve"] == []
    assert [row["answer"] for row in cells[0]["scoring"]] == ["None"] * 3


# ---------------------------------------------------------------- the report


def random_cells(concepts, seeds=(0, 1)):
    dice = random.Random(0)
    cells = []
    for method in ("none", "prompt", "S-PSR MSE"):
        for trial in concepts:
            for seed in seeds:
                factors = () if method in ("none", "prompt") else (0.5, 1.0)
                drawn = rate(lambda *_: dice.choice([None, 0, 1, 2, 2]))
                result = json.loads(json.dumps(tried_out([trial], factors, echo, drawn)[trial.concept.id]))
                about = {"concept": trial.concept.id}
                cells.append(Cell("org/m", trial.concept.description, method, seed, about, result))
    return cells


def test_the_table_is_means_over_concepts(tmp_path):
    cells = random_cells([SEA, LAND])
    report = axbench_report(recipe_in(tmp_path, seeds="0,1"), cells)
    table, by_concept = report.tables
    for method in ("none", "prompt", "S-PSR MSE"):
        of_method = [cell for cell in cells if cell.method == method]
        means = []
        for concept in (0, 7):
            rows = [row for cell in of_method if cell.more["concept"] == concept for row in cell.result["scoring"]]
            means.append(statistics.mean(row["score"] for row in rows if row["score"] is not None))
        row = table.rows[method]
        assert row["score"].mean == pytest.approx(statistics.mean(means))
        assert row["score"].low <= row["score"].mean <= row["score"].high
        assert by_concept.rows["7: of dogs"][method].mean == pytest.approx(means[1])
        answers = [row for cell in of_method for row in cell.result["choosing"] + cell.result["scoring"]]
        lost = sum(row["score"] is None for row in answers)
        assert row["unparsable %"].mean == pytest.approx(100 * lost / len(answers)) and lost
    assert table.rows["none"]["factor"].mean is None and table.rows["none"]["factor"].why == "no adapter"
    assert 0.5 <= table.rows["S-PSR MSE"]["factor"].mean <= 1.0
    assert {path.name for path in write_report(tmp_path / "out", report)} >= {"results.json", "factors_org_m.png"}
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["cells"]
    assert len(kept) == 12 and "choosing" not in kept[0] and kept[0]["scoring"] and kept[0]["instructions"]["choosing"]
    assert sum(cell["unread_ratings"].get("fluency", 0) for cell in kept) > 0


def test_of_one_concept_the_interval_is_over_instructions(tmp_path):
    report = axbench_report(recipe_in(tmp_path, seeds="0,1"), random_cells([SEA]))
    (table,) = report.tables
    assert table.rows["prompt"]["score"].low is not None and "over instructions" in report.description


def test_a_concept_without_scores_is_said(tmp_path):
    cells = random_cells([SEA, LAND], seeds=(0,))
    for cell in cells:
        if cell.method == "S-PSR MSE" and cell.more["concept"] == 7:
            cell.result.update(factor=None, scoring=[])
    table, by_concept = axbench_report(recipe_in(tmp_path), cells).tables
    assert table.rows["S-PSR MSE"]["score"].why == "without 1 of 2 that have no score: 7"
    assert by_concept.rows["7: of dogs"]["S-PSR MSE"].mean is None


# ---------------------------------------------------------------- all of it


def random_lora(folder, seed):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_path())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(folder)


def plainly(trial, method, factor, adapters):
    """The answers to score, one after the other on a model of their own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_path())
    if method in adapters:
        model = PeftModel.from_pretrained(model, adapters[method][trial.concept.id]).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "direction" in name:
                parameter.data.mul_(factor)
    answers = []
    for place, instruction in enumerate(trial.scoring, len(trial.choosing)):
        prompt = [{"role": "user", "content": instruction}]
        if method == "prompt":
            asked = CONCEPT_INSTRUCTION.replace("{concept}", trial.concept.description)
            prompt = [{"role": "system", "content": asked}, *prompt]
        seeds = [draw_seed(0, f"axbench/{trial.concept.id}/{place}")]
        answers += [completion.text for completion in sample_completions(model, tokenizer, [prompt], 8, seeds=seeds)]
    return answers


def test_everything_on_the_embedded_model(tmp_path, monkeypatch):
    tried = {trial.concept.id: trial for trial in trials(recipe_in(tmp_path))}
    loras = {i: tmp_path / "loras" / folder_name(trial.concept.description) for i, trial in tried.items()}
    for i, folder in loras.items():
        random_lora(folder, seed=i)
    options = {"adapters": {"a lora": f"{tmp_path}/loras/{{trait}}"}, "judge_cache": str(tmp_path / "replies.sqlite")}
    with UnrulyServer(reply=by_rule) as server:
        recipe = recipe_in(tmp_path, judge_url=server.url, **options)
        results, asked = {}, []
        for together_at_once in (16, 1):  # in mixed batches, and each concept by itself
            monkeypatch.setattr(axbench_benchmark, "CONCEPTS_TOGETHER", together_at_once)
            bench = Workbench(recipe, tmp_path / f"run_{together_at_once}", "axbench")
            check_axbench(bench)
            with bench.open():
                results[together_at_once] = run_axbench(bench)
            asked.append(len(server.bodies))
        mixed, alone = results[16], results[1]
        facts = ("seconds", "bytes")
        for one, other in zip(mixed.results["cells"], alone.results["cells"], strict=True):
            assert {k: v for k, v in one.items() if k not in facts} == {
                k: v for k, v in other.items() if k not in facts
            }
        assert list(mixed.tables[0].rows) == ["none", "prompt", "S-Const DiM", "a lora"]

        assert asked[0] == asked[1]  # the judge was shown nothing new

        # a rerun asks nothing and fits nothing
        monkeypatch.setattr(axbench_benchmark, "_measure", lambda *_: pytest.fail("measured again"))
        with bench.open():
            assert run_axbench(bench).tables == alone.tables
        assert len(server.bodies) == asked[0]

    cells = {(cell["concept"], cell["method"]): cell for cell in mixed.results["cells"]}
    assert len(cells) == 8
    adapters = {"a lora": loras, "S-Const DiM": {}}
    for path in (tmp_path / "run_16" / "adapters").glob("*/fit.json"):
        trait = json.loads(path.read_text())["parameters"]["trait"]
        adapters["S-Const DiM"][{trial.concept.description: i for i, trial in tried.items()}[trait]] = path.parent
    for (concept, method), cell in cells.items():
        trial = tried[concept]
        assert [row["instruction"] for row in cell["scoring"]] == list(trial.scoring)
        assert not set(trial.choosing + trial.scoring) & set(trial.concept.inputs)
        assert [row["answer"] for row in cell["scoring"]] == plainly(trial, method, cell["factor"], adapters)
        if method in adapters:
            assert cell["factor"] in (8.0, 40.0) and {row["factor"] for row in cell["scoring"]} == {cell["factor"]}
            assert [factor for factor, _, _ in cell["curve"]] == [8.0, 40.0] and cell["dead_gates"] == []
    answers = {}
    for (_, method), cell in cells.items():
        answers.setdefault(method, []).extend(row["answer"] for row in cell["scoring"])
    assert len(set(map(tuple, answers.values()))) == 4
    assert any("[[" not in why for cell in cells.values() for row in cell["scoring"] for why in row["unread"].values())
    files = write_report(tmp_path / "run_1", alone)
    assert all(path.stat().st_size for path in files)
    assert alone.samples[0].answers["a lora"] == cells[0, "a lora"]["scoring"][0]["answer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": "0.5,0"}, "factors"),
        ({"test_instructions": 1}, "test_instructions: 1 is wrong; accepted: a whole number, at least 2"),
        ({"test_instructions": 60}, "Concept 0 is to be tried on 60 instructions, and only"),
        ({"train_alpha": "trait_score"}, "own_answers: the data set's answers have no trait scores"),
        ({"triplets": "x.jsonl"}, "own_answers and triplets both"),
        ({"judge": "grammar"}, "judge: grammar can score source: embedded alone, got source: axbench"),
        ({"traits": "1"}, "has no concept 1; it has 0, 3"),
        ({"source": "embedded"}, "source: 'embedded' is wrong"),
        ({"questions_data": "nowhere.txt"}, "questions_data: no file 'nowhere.txt'"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_axbench(Workbench(recipe_in(tmp_path, **options), tmp_path / "run", "axbench"))
    assert not (tmp_path / "run").exists()


def test_the_recipe_that_ships_is_whole(tmp_path):
    recipe = load_evaluate_recipe(AxBenchRecipe, "axbench-gemma", {"data": str(write_data(tmp_path))})
    assert recipe.test_instructions == 10 and recipe.max_new_tokens == 128 and len(recipe.factors) == 14
    assert recipe.train_alpha == 1.0 and recipe.temperature == 1.0 and len(trials(recipe)) == 2
