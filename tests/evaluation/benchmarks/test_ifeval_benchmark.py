"""IFEval as a benchmark: no adapter tested on its own prompts, mistakes shown first, a run on the embedded model."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from helpers.unruly_server import MODEL, UnrulyServer

from peft_psr.evaluation.benchmarks.ifeval import benchmark as ifeval_benchmark
from peft_psr.evaluation.benchmarks.ifeval.benchmark import check_ifeval, run_ifeval
from peft_psr.evaluation.benchmarks.ifeval.recipe import IFEvalRecipe
from peft_psr.evaluation.benchmarks.ifeval.scoring import bare_text
from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.reports.report_files import write_report
from peft_psr.tiny_chat import questions
from peft_psr.training.data.draws import Completion
from peft_psr.training.runs.triplets.assembly import prompt_pairs


pytestmark = pytest.mark.skipif(
    not all(find_spec(name) for name in ("lm_eval", "langdetect", "nltk")),
    reason="the extra ifeval is not installed",
)
COMMAS, QUOTES, WORD, SHORT = (
    "punctuation:no_comma",
    "startend:quotation",
    "keywords:existence",
    "length_constraints:number_words",
)


def row(question, instruction=COMMAS, text="Use no commas.", **kwargs):
    return {
        "key": 7,
        "prompt": f"{text} {question}",
        "prompt_without_instruction": question,
        "instruction_id_list": [instruction],
        "kwargs": [kwargs],
    }


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made_recipe(tmp_path, *rows, **fields):
    settings = {"models": "embedded", "methods": "S-PSR MSE", "min_coherence_score": 0, **fields}
    return load_evaluate_recipe(IFEvalRecipe, None, {"data": write(tmp_path / "data.jsonl", *rows), **settings})


# ---------------------------------------------------------------- a run with a bench that answers by rule


class FakeBench:
    """A bench whose adapters obey on bare prompts, and whose plain model obeys only where it is told to."""

    benchmark = "ifeval"

    def __init__(self, recipe, monkeypatch, triplets=None):
        self.recipe, self.fits, self.measured, self.expected = recipe, [], {}, None
        self.rows = triplets or (lambda trait: [{"prompt": p.prompt} for p in self.pairs("train")[trait]])
        monkeypatch.setattr(ifeval_benchmark, "_triplets", lambda bench, model, trait: self.rows(trait))
        monkeypatch.setattr(ifeval_benchmark, "sample_steered", self.sample)

    def check(self):
        pass

    def pairs(self, split):
        pairs = {}
        for found in prompt_pairs(self.recipe.triplet_recipe("embedded", ())):
            pairs.setdefault(found.trait, []).append(found)
        return pairs

    def load(self, model):
        return SimpleNamespace(steered=False), None

    @contextmanager
    def fitted(self, cell, triplets, part):
        self.fits.append((cell.trait, cell.method, cell.seed or 0, part, triplets))
        yield SimpleNamespace(model=SimpleNamespace(steered=True), dead_gates=[], notes={}, seconds=1.0)

    def sample(self, model, processing_class, prompts, alpha, **settings):
        obeys = [model.steered or "commas" in prompt[0]["content"] for prompt in prompts]
        return [Completion("fine" if good else "fine, sunny", not good) for good in obeys]

    def expect(self, cells):
        self.expected = cells

    def cells(self, cells, measure):
        done = []
        for cell in cells:
            key = json.dumps(cell.parameters, sort_keys=True)
            assert key not in self.measured, "one cell was measured twice"
            self.measured[key] = json.loads(json.dumps(measure(cell)))
            done.append(replace(cell, result=json.loads(json.dumps(self.measured[key]))))
        return done


def test_no_adapter_is_tested_on_what_it_was_made_from(tmp_path, monkeypatch):
    rows = [row(f"How is q{q}?") for q in range(7) for _ in range(2)]
    bench = FakeBench(made_recipe(tmp_path, *rows, folds=3, seeds="0,1", alphas="1,2"), monkeypatch)
    report = run_ifeval(bench)
    assert bench.expected == len(bench.measured) == 2 + 3 * 2 * 2
    asked = {}
    for answer in report.results["answers"]:
        asked.setdefault((answer["condition"], answer["seed"], answer["alpha"]), []).append(answer)
    assert all(len({a["pair"] for a in some}) == len(some) == 14 for some in asked.values())
    assert sorted({key[0] for key in asked}) == [
        "S-PSR MSE, alpha 1",
        "S-PSR MSE, alpha 1 + prompt",
        "S-PSR MSE, alpha 2",
        "S-PSR MSE, alpha 2 + prompt",
        "none",
        "prompt",
    ]
    trained = {(seed, part): {bare_text(t["prompt"]) for t in rows} for _, _, seed, part, rows in bench.fits}
    assert set(trained) == {(seed, f"fold{i}") for seed in (0, 1) for i in range(3)}
    for answer in report.results["answers"]:
        if answer["alpha"]:
            seen = trained[answer["seed"], answer["fold"]]
            assert answer["question"] not in seen and len(seen) >= 4


def test_accuracies_of_the_four_conditions(tmp_path, monkeypatch):
    rows = [row(f"How is q{q}?") for q in range(4)]
    same = row("How is q4?") | {"prompt": "How is q4?"}
    report = run_ifeval(FakeBench(made_recipe(tmp_path, *rows, same), monkeypatch))
    summary = report.tables[0]
    assert {name: values["strict"].mean for name, values in summary.rows.items()} == {
        "none": 0.0,
        "prompt": 100.0,
        "S-PSR MSE": 100.0,
        "S-PSR MSE + prompt": 100.0,
    }
    assert summary.rows["none"]["cut off"].mean == 100 and "4 of 16 answers were cut off" in " ".join(report.notes)
    assert all(values["coherence"].mean is None for values in summary.rows.values())
    assert summary.rows["none"]["coherence"].why == "the recipe names no coherence_judge"
    assert [sample.scores for sample in report.samples] == [
        {"none": "not followed", "prompt": "followed", "S-PSR MSE": "followed", "S-PSR MSE + prompt": "followed"}
    ]
    assert f"the instruction still there: {COMMAS}/7/4." in " ".join(report.notes)
    assert report.results["accuracy"]["embedded"]["S-PSR MSE"]["families"]["format"]["prompts"] == 4
    json.dumps(report.results)


@pytest.mark.parametrize(
    ("said", "followed"), [("<think>one, two</think>fine", 100.0), ("<think>so", 0.0), ("fine", 100.0)]
)
def test_checkers_see_no_reasoning(tmp_path, monkeypatch, said, followed):
    bench = FakeBench(made_recipe(tmp_path, *[row(f"How is q{q}?") for q in range(4)]), monkeypatch)
    bench.sample = lambda model, tokenizer, prompts, *_, **__: [Completion(said, False)] * len(prompts)
    monkeypatch.setattr(ifeval_benchmark, "sample_steered", bench.sample)
    report = run_ifeval(bench)
    assert {values["strict"].mean for values in report.tables[0].rows.values()} == {followed}
    assert {answer["answer"] for answer in report.results["answers"]} == {said}


def test_sampled_answers_are_drawn_for_each_seed_of_every_condition(tmp_path, monkeypatch):
    rows = [row(f"How is q{q}?") for q in range(4)]
    recipe = made_recipe(tmp_path, *rows, seeds="0,1", answer_temperature=1.0, adapters={"mine": "a"})
    report = run_ifeval(FakeBench(recipe, monkeypatch))
    for name, condition in report.results["accuracy"]["embedded"].items():
        assert list(condition["seeds"]) == ["0", "1"], name


def test_a_given_adapter_answers_everything_and_needs_no_triplets(tmp_path, monkeypatch):
    recipe = made_recipe(tmp_path, row("How is q0?"), methods="none", adapters={"mine": "folder"})
    bench = FakeBench(recipe, monkeypatch, triplets=lambda trait: pytest.fail("draws triplets"))
    report = run_ifeval(bench)
    assert [fit[:3] for fit in bench.fits] == [(COMMAS, "mine", 0)]
    assert list(report.tables[0].rows) == ["none", "prompt", "mine", "mine + prompt"]
    assert "mine: given, not made here" in " ".join(report.notes) and "No adapter was made" in report.description


def test_what_can_not_be_tested_is_left_out_and_named(tmp_path, monkeypatch):
    rows = [row(f"How is q{q}?") for q in range(4)]
    rows += [row("How is q0?", SHORT, relation="less than", num_words=4)]
    rows += [row(f"How is q{q}?", QUOTES) for q in range(4)]
    rows += [row(f"How is q{q}?", WORD, keywords=[word]) for q, word in enumerate("abcd")]
    kept = {COMMAS: 4, QUOTES: 0, WORD: 1}

    def triplets(trait):
        return [{"prompt": f"How is q{q}?"} for q in range(kept[trait])]

    report = run_ifeval(FakeBench(made_recipe(tmp_path, *rows), monkeypatch, triplets))
    reasons = report.results["left_out"]["embedded"]
    assert "1 different bare prompts can't be parted into 2 folds" in reasons[SHORT]
    assert "none of the model's answers under the instruction was kept" in reasons[QUOTES]
    assert "all 1 triplets are on prompts that one adapter is to be tested on" in reasons[WORD]
    assert {answer["trait"] for answer in report.results["answers"]} == {COMMAS}
    assert sum(note.startswith("Left out for embedded") for note in report.notes) == 3

    kept[WORD] = 4
    report = run_ifeval(FakeBench(made_recipe(tmp_path, *rows), monkeypatch, triplets))
    assert any(f"These differ in {WORD}:" in note for note in report.notes)
    kept.update(dict.fromkeys(kept, 0))
    with pytest.raises(ValueError, match="No type can be tested: embedded: .*no_comma: none of the model's"):
        run_ifeval(FakeBench(made_recipe(tmp_path, *rows), monkeypatch, triplets))


def test_cells_follow_what_they_were_made_from(tmp_path, monkeypatch):
    rows = [row(f"How is q{q}?") for q in range(4)]
    recipe = made_recipe(tmp_path, *rows)
    first, other = FakeBench(recipe, monkeypatch), None
    run_ifeval(first)
    other = FakeBench(recipe, monkeypatch, lambda trait: [{"prompt": f"How is q{q}?", "more": 1} for q in range(4)])
    run_ifeval(other)
    same = set(first.measured) & set(other.measured)
    assert {json.loads(key)["method"] for key in same} == {"none", "prompt"}


# ---------------------------------------------------------------- what is refused beforehand


def checked(recipe, tmp_path):
    check_ifeval(Workbench(recipe, tmp_path / "run", "ifeval"))


def test_mistakes_show_before_any_work(tmp_path, monkeypatch):
    import nltk

    good = [row("a"), row("b")]
    checked(made_recipe(tmp_path, *good), tmp_path)
    with pytest.raises(FileNotFoundError, match="IFEval's prompts are not at '.*lost'"):
        checked(made_recipe(tmp_path, *good, data=str(tmp_path / "lost")), tmp_path)
    with pytest.raises(FileNotFoundError, match="IFEval's prompts are not at '.*lost'"):
        checked(made_recipe(tmp_path, *good, train_data=str(tmp_path / "lost")), tmp_path)
    with pytest.raises(ValueError, match="No type can be tested: .*no_comma: 1 different bare prompts"):
        checked(made_recipe(tmp_path, row("a"), row("a")), tmp_path)
    checked(made_recipe(tmp_path, row("a"), methods="none"), tmp_path)
    with pytest.raises(ValueError, match="No checker for punctuation:no_full_stop"):
        checked(made_recipe(tmp_path, *good, row("c", "punctuation:no_full_stop")), tmp_path)
    other = write(tmp_path / "train.jsonl", row("c", QUOTES))
    with pytest.raises(ValueError, match="No type can be tested: punctuation:no_comma has no prompts in train_data"):
        checked(made_recipe(tmp_path, *good, train_data=other), tmp_path)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    sentences = row("c", "length_constraints:number_sentences", relation="less than", num_sentences=3)
    checked(made_recipe(tmp_path, *good), tmp_path)
    with pytest.raises(FileNotFoundError, match="number_sentences needs NLTK's data punkt_tab"):
        checked(made_recipe(tmp_path, *good, sentences), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"judge": "grammar"}, "judge: 'grammar' is wrong; accepted: ifeval"),
        ({"source": "embedded"}, "source: 'embedded' is wrong; accepted: ifeval"),
        ({"folds": 1}, "folds: 1 is wrong; accepted: a whole number, at least 2"),
        ({"alphas": ".inf"}, "alphas: '.inf' is wrong"),
        ({"train_data": "a", "triplets": "b"}, "triplets are there already: leave out train_data"),
        ({"min_coherence_score": 50}, "judge: ifeval scores no coherence"),
        ({"data": None}, "source: ifeval needs data"),
    ],
)
def test_recipes_that_can_not_work(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        made_recipe(tmp_path, row("a"), **fields)


def test_the_recipe_that_ships_follows_the_protocol():
    with pytest.raises(ValueError, match="source: ifeval needs data"):
        load_evaluate_recipe(IFEvalRecipe, "ifeval-paper", {})
    recipe = load_evaluate_recipe(IFEvalRecipe, "ifeval-paper", {"data": "prompts.jsonl"})
    assert (recipe.alphas, recipe.train_alpha, recipe.positions) == ((1.0,), 1.0, "response")


# ---------------------------------------------------------------- the embedded model


def grade(body):
    """Coherence as the server has it: 90, but 40 for a pirate's answer."""
    score = "40" if "thunder" in body["messages"][0]["content"] else "90"
    return score, [(score, {score: 1.0})]


ASKED = [question.text for question in questions("train")[::11]]


@pytest.fixture(scope="module")
def embedded_run(tmp_path_factory):
    """Recipe, folder and report of a run that draws, judges, trains and answers; twice, the second from its cells."""
    tmp_path = tmp_path_factory.mktemp("ifeval")
    rows = [row(question, WORD, "Talk like a pirate.", keywords=["thunder"]) for question in ASKED]
    rows += [row(question, QUOTES, "Please.") for question in ASKED[:2]]
    with UnrulyServer(reply=grade) as server:
        recipe = made_recipe(
            tmp_path, *rows, methods="A-PSR MSE ridge", draws=2, max_new_tokens=56, epochs=1, min_coherence_score=20,
            coherence_judge="server", judge_model=MODEL, judge_url=server.url,
        )  # fmt: skip
        reports, asked = [], []
        for _ in range(2):
            bench = Workbench(recipe, tmp_path / "run", "ifeval")
            check_ifeval(bench)
            with bench.open():
                reports.append(run_ifeval(bench))
            asked.append(len(server.bodies))
    assert asked[0] == asked[1] > 0, "the second run asked the judge again"
    assert not any("Talk like" in body["messages"][0]["content"] for body in server.bodies), "shown the instruction"
    return tmp_path / "run", reports


def test_the_adapter_does_without_the_prompt_what_the_prompt_asks_for(embedded_run):
    _, (report, _) = embedded_run
    rows = report.tables[0].rows
    assert list(rows) == ["none", "prompt", "A-PSR MSE ridge", "A-PSR MSE ridge + prompt"]
    strict = {name: values["strict"].mean for name, values in rows.items()}
    assert strict["none"] == 0 and strict["prompt"] > 70 and strict["A-PSR MSE ridge"] > 70
    for answer in report.results["answers"]:
        assert answer["strict"] == ("thunder" in answer["answer"]) and answer["loose"] >= answer["strict"]
        assert answer["coherence"] == (40 if answer["strict"] else 90)
    assert rows["none"]["coherence"].mean == 90
    assert "none of the model's answers" in report.results["left_out"]["embedded"][QUOTES]
    folds = {adapter["fold"]: adapter for adapter in report.results["adapters"]}
    assert set(folds) == {"fold0", "fold1"} and sum(fold["prompts"] for fold in folds.values()) == len(ASKED)


def test_a_rerun_finds_everything(embedded_run, tmp_path):
    folder, (first, again) = embedded_run
    assert again.results == first.results
    assert len(list((folder / "cells").iterdir())) == 4 and len(list((folder / "adapters").iterdir())) == 2
    names = {path.name for path in write_report(tmp_path, first)}
    assert names >= {"results.json", "table.md", "report.html", "accuracy_by_type_embedded.png"}


def test_triplets_of_other_prompts(embedded_run, tmp_path, monkeypatch):
    """With train_data all prompts are tested with one adapter, which is made from none of them."""
    rows = [row(question, WORD, "Talk like a pirate.", keywords=["thunder"]) for question in ASKED[:4]]
    train = write(tmp_path / "train.jsonl", *rows[2:], row("Tell me about tea.", WORD, "Talk.", keywords=["by"]))
    recipe = made_recipe(tmp_path, *rows[:3], train_data=train)
    drawn = [{"prompt": question} for question in (*ASKED[2:4], "Tell me about tea.")]
    seen = {}

    class OtherBench(FakeBench):
        folder, beside, _loaded, _progress = tmp_path / "run", Workbench.beside, {}, None

    def triplets(bench, model, trait):
        seen["recipe"], seen["folder"] = bench.recipe, bench.folder
        return drawn

    monkeypatch.setattr(Workbench, "triplets", triplets)
    find = ifeval_benchmark._triplets
    bench = OtherBench(recipe, monkeypatch)
    monkeypatch.setattr(ifeval_benchmark, "_triplets", find)
    report = run_ifeval(bench)
    assert seen["recipe"].data == train and seen["folder"] == tmp_path / "run" / "train_data"
    ((_, _, _, part, made_from),) = bench.fits
    assert part == "train_data" and [row["prompt"] for row in made_from] == [ASKED[3], "Tell me about tea."]
    assert {answer["question"] for answer in report.results["answers"]} == set(ASKED[:3])
