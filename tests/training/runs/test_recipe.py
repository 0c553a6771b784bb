"""Recipes: read, checked field by field, and put together from their parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.unruly_server import MODEL, UnrulyServer

from peft_psr.evaluation.benchmarks.persona.recipe import PersonaRecipe
from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
from peft_psr.tiny_chat import tiny_chat_path
from peft_psr.training.data.by_trait import folder_name
from peft_psr.training.data.triplets import read_triplets
from peft_psr.training.judges.grammar import GrammarJudge
from peft_psr.training.judges.prompts import COHERENCE_PROMPT
from peft_psr.training.runs.drafting import make_chat
from peft_psr.training.runs.recipe_fields import in_words
from peft_psr.training.runs.train.recipe import load_train_recipe
from peft_psr.training.runs.triplets.assembly import judge_maker, judge_prompts, make_sampler, prompt_pairs
from peft_psr.training.runs.triplets.estimate import estimate
from peft_psr.training.runs.triplets.recipe import Recipe, load_recipe, shipped_recipes
from peft_psr.training.runs.triplets.run import MANIFEST, REPORT, SCORES, TRIPLETS, TripletRun


SMALL = {"source": "embedded", "model": "embedded", "judge": "grammar", "traits": "formal"}
TRAIT = {
    "instruction": [{"pos": "Be formal.", "neg": "Be casual."}, {"pos": "Use formal words.", "neg": "Use slang."}],
    "questions": ["What is tea?", "What are dogs?", "Where is the sea?"],
    "eval_prompt": "Is this formal? {question} {answer}",
}
IFEVAL = {
    "key": 1,
    "prompt": "What is tea? No commas.",
    "prompt_without_instruction": "What is tea?",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}


def write_trait(folder, **fields):
    for part, questions in (("extract", TRAIT["questions"]), ("eval", ["What is rain?"])):
        path = folder / f"trait_data_{part}" / "formal.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**TRAIT, "questions": questions, **fields}))
    return str(folder)


def run(recipe, folder):
    pairs = prompt_pairs(recipe)
    return TripletRun(folder, recipe, pairs, lambda: make_sampler(recipe), judge_maker(recipe, pairs, folder)).run()


# ---------------------------------------------------------------- the schema


def test_options_go_before_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "draws": 3, "seed": 1}))
    recipe = load_recipe(path, {"seed": "7", "traits": "formal, pirate", "max_similarity": "none"})
    assert (recipe.draws, recipe.seed, recipe.traits, recipe.max_similarity) == (3, 7, ("formal", "pirate"), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drawz": 3}, r"unknown field drawz \(value 3\). Did you mean draws\? The fields are .*description, source"),
        ({"draws": "ten"}, "draws: 'ten' is wrong; accepted: a whole number, at least 1. Completions for each"),
        ({"draws": 0}, "draws: 0 is wrong; accepted: a whole number, at least 1"),
        ({"temperature": -1}, "temperature: -1 is wrong; accepted: a number, at least 0"),
        ({"sampler": "remote"}, r"sampler: 'remote' is wrong; accepted: local \| server"),
        ({"max_similarity": 2}, r"max_similarity: 2 is wrong; accepted: a number, above 0, at most 1 \| none"),
        ({"traits": 3}, "traits: 3 is wrong; accepted: a list of names"),
        ({"model": None}, "model: None is wrong; accepted: text"),
        ({"source": "personas"}, "judge: grammar can score source: embedded alone, got source: personas"),
        ({"source": "axbench"}, "source: axbench needs data"),
        ({"sampler": "server", "model": "m"}, "sampler: server needs server_url: Such as http"),
        ({"sampler": "server", "server_url": "http://a/v1"}, "model: embedded is drawn from here"),
        ({"judge": "local"}, "a judge that is local needs judge_model"),
        ({"judge": "server", "judge_model": "m"}, "A judge that is server needs judge_url"),
        ({"negatives": True}, "source: embedded has no instructions for the opposite"),
        ({"coherence_judge": "local", "judge_model": "m"}, "judge: grammar scores coherence itself"),
        ({"source": "ifeval", "data": "a", "judge": "ifeval"}, "scores no coherence. Name a coherence_judge, or set"),
        (
            {"source": "ifeval", "data": "a", "judge": "local", "judge_model": "m", "placement": "after"},
            "source: ifeval has no choice of placement",
        ),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(None, {**SMALL, **fields})


def test_every_bad_field_is_named_at_once_and_missing_ones_too():
    with pytest.raises(ValueError) as error:
        load_recipe(None, {"model": "m", "draws": 0, "seed": "x"})
    for name in ("draws: 0", "seed: 'x'", "source is missing", "judge is missing"):
        assert name in str(error.value)


def test_a_key_in_the_wrong_place_is_not_shown():
    with pytest.raises(ValueError, match="must be the name of an environment variable") as error:
        load_recipe(None, {**SMALL, "server_key_variable": "sk-hunter2"})
    assert "hunter2" not in str(error.value)
    with pytest.raises(ValueError, match="server_url must look like http://localhost:8000/v1, without user") as error:
        load_recipe(None, {**SMALL, "server_url": "http://me:hunter2@host/v1"})
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "must hold fields such as 'seed: 1', got list"), ("a: [", "is not YAML"), ("", "got NoneType")],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_home_in_every_field_that_is_a_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(SMALL))
    places = ("data", "model", "judge_model", "judge_cache", "trait_prompt", "coherence_prompt")
    recipe = load_recipe("~/my.yaml", {name: f"~/{name}" for name in places})
    assert {name: getattr(recipe, name) for name in places} == {name: f"{tmp_path}/{name}" for name in places}
    train = load_train_recipe(None, {"model": "~/m", "triplets": "~/t", "triplets_model": "~/n"})
    assert (train.model, train.triplets, train.triplets_model) == (f"{tmp_path}/m", f"{tmp_path}/t", f"{tmp_path}/n")
    measured = load_evaluate_recipe(PersonaRecipe, "persona-embedded", {"models": "~/m, owner/name", "adapters": "{}"})
    assert measured.models == (f"{tmp_path}/m", "owner/name")
    measured = load_evaluate_recipe(
        PersonaRecipe, "persona-embedded", {"models": "m", "triplets": "~/t", "adapters": '{"a": "~/{trait}"}'}
    )
    assert measured.triplets == f"{tmp_path}/t" and measured.adapters == {"a": f"{tmp_path}/{{trait}}"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": True}, "draws: True is wrong; accepted: a whole number, at least 1"),  # YAML's yes
        ({"temperature": float("inf")}, "temperature: inf is wrong; accepted: a number"),
        ({"revision": 1234567}, "revision: 1234567 is wrong; .*In YAML, a text that looks like a number"),
        ({"judge_fields": '{"a": 1, "a": 2}'}, r"judge_fields: a key comes twice \(a, a\)"),
        ({"judge_fields": '{"a": '}, "judge_fields: '{\"a\": ' is wrong; accepted: a JSON object"),
    ],
)
def test_what_yaml_and_json_make_of_a_field(fields, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(None, {**SMALL, **fields})


def test_traits_are_asked_for_in_either_unicode_form(tmp_path):
    folder = Path(write_trait(tmp_path / "data"))
    for path in folder.glob("*/formal.json"):
        path.rename(path.with_name("cafe\u0301.json"))
    for name in ("café", "cafe\u0301"):
        recipe = load_recipe(None, {**SMALL, "source": "personas", "data": str(folder), "judge": "local",
                                    "judge_model": "embedded", "traits": name})  # fmt: skip
        assert {pair.trait for pair in prompt_pairs(recipe)} == {"caf\u00e9"}
    assert folder_name("cafe\u0301 au lait") == folder_name("café au lait") == "caf\u00e9_au_lait"


def test_a_missing_file_names_those_that_ship():
    with pytest.raises(
        FileNotFoundError, match="No recipe file 'mine.yaml', and none of that name ships; there are: axb"
    ):
        load_recipe("mine.yaml")


def test_what_decides_the_draws_is_fixed():
    recipe = load_recipe(None, SMALL)
    for name, value in {"draws": 3, "seed": 1, "model": "m", "temperature": 0.5, "dtype": "float16"}.items():
        assert load_recipe(None, {**SMALL, name: value}).fixed_hash() != recipe.fixed_hash()
    free = {"batch_size": 1, "device_map": "cpu", "min_trait_score": 0, "max_failure_share": 1, "timeout": 5}
    assert load_recipe(None, {**SMALL, **free}).fixed_hash() == recipe.fixed_hash()


def test_every_field_says_what_it_is_and_takes():
    assert all(field.description and in_words(Recipe, name) for name, field in Recipe.model_fields.items())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_sound(name):
    recipe = load_recipe(name, {"data": "given"} if name in ("ifeval", "axbench") else {})
    assert recipe.description and recipe.model


def test_recipes_for_each_way_ship():
    recipes = [load_recipe(name, {"data": "given"}) for name in shipped_recipes()]
    assert {recipe.source for recipe in recipes} == {"embedded", "personas", "ifeval", "axbench"}
    assert {recipe.sampler for recipe in recipes} == {"local", "server"}
    assert {recipe.judge for recipe in recipes} == {"grammar", "ifeval", "server", "local"}


# ---------------------------------------------------------------- prompts


def test_embedded_prompts():
    pairs = prompt_pairs(load_recipe(None, {**SMALL, "traits": "formal,pirate", "instructions": 2, "questions": 3}))
    assert [pair.id for pair in pairs][:4] == ["formal/0/0", "formal/0/1", "formal/0/2", "formal/1/0"]
    assert len({pair.id for pair in pairs}) == len(pairs) == 12
    assert pairs[0].steered_prompt[0]["role"] == "system" and pairs[0].steered_prompt[1:] == pairs[0].prompt
    with pytest.raises(ValueError, match="source: embedded has no 'rude'; there are: sycophantic"):
        prompt_pairs(load_recipe(None, {**SMALL, "traits": "rude"}))


def test_persona_prompts_with_negatives(tmp_path):
    given = {"source": "personas", "model": "m", "judge": "local", "judge_model": "m", "data": write_trait(tmp_path)}
    pairs = prompt_pairs(load_recipe(None, {**given, "negatives": True, "placement": "after", "questions": 2}))
    assert len(pairs) == 8 and sum(pair.negative for pair in pairs) == 4
    assert pairs[0].steered_prompt == [{"role": "user", "content": "What is tea?\n\nBe formal."}]
    assert pairs[-1].steered_prompt[0]["content"].endswith("Use slang.")
    assert len(prompt_pairs(load_recipe(None, {**given, "split": "test", "instructions": 1}))) == 1
    shipped = prompt_pairs(load_recipe("personas-local"))
    assert {pair.trait for pair in shipped} == {"sycophantic"} and len(shipped) == 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"questions": []}, "questions must be a list with at least one entry"),
        ({"instruction": [{"pos": " ", "neg": "Be casual."}]}, r"instruction\[0\].pos must be text that is not empty"),
    ],
)
def test_a_trait_without_questions_or_with_an_empty_instruction(tmp_path, fields, message):
    folder = write_trait(tmp_path / "bad", **fields)
    given = {"source": "personas", "model": "m", "judge": "local", "judge_model": "m", "data": folder}
    with pytest.raises(ValueError, match=message):
        prompt_pairs(load_recipe(None, given))


def test_ifeval_prompts_without_those_that_have_no_instruction(tmp_path, caplog):
    path = tmp_path / "ifeval.jsonl"
    given = {"source": "ifeval", "model": "embedded", "judge": "local", "judge_model": "m", "data": str(path)}
    path.write_text("".join(json.dumps({**IFEVAL, "key": i}) + "\n" for i in range(3)))
    assert len(prompt_pairs(load_recipe(None, given))) == 3
    assert len(prompt_pairs(load_recipe(None, {**given, "questions": 2}))) == 2
    path.write_text("".join(json.dumps({**IFEVAL, **fields}) + "\n" for fields in ({}, {"prompt": "What is tea?"})))
    assert [pair.id for pair in prompt_pairs(load_recipe(None, given))] == ["punctuation:no_comma/1/0"]
    assert "punctuation:no_comma/1/1 is left out: its prompt is the same" in caplog.text
    with pytest.raises(FileNotFoundError):
        prompt_pairs(load_recipe(None, {**given, "data": str(tmp_path / "none.jsonl")}))


def test_axbench_prompts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"input": f"Q{i}", "output": "A", "category": "positive", "concept_id": i % 2} for i in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    concepts = [{"concept_id": i, "concept": f"concept {i}"} for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(concept) + "\n" for concept in concepts))
    pairs = prompt_pairs(load_recipe("axbench", {"data": str(tmp_path), "traits": "1", "questions": 2}))
    assert [(pair.trait, pair.prompt[0]["content"]) for pair in pairs] == [("concept 1", "Q1"), ("concept 1", "Q3")]
    assert pairs[0].steered_prompt[0]["content"].endswith("concept 1\n\nQ1")
    with pytest.raises(ValueError, match="known by their number, got 'sea'"):
        prompt_pairs(load_recipe("axbench", {"data": str(tmp_path), "traits": "sea"}))


def test_prompts_for_the_judge_in_place_of_its_own(tmp_path):
    given = {"source": "personas", "model": "m", "judge": "local", "judge_model": "m",
             "data": write_trait(tmp_path / "data")}  # fmt: skip
    pairs = prompt_pairs(load_recipe(None, given))
    assert judge_prompts(load_recipe(None, given), pairs) == ({"formal": TRAIT["eval_prompt"]}, COHERENCE_PROMPT)
    mine = tmp_path / "mine.txt"
    mine.write_text("How formal? {answer}")
    given |= {"trait_prompt": str(mine), "coherence_prompt": str(mine)}
    assert judge_prompts(load_recipe(None, given), pairs) == ({"formal": mine.read_text()}, mine.read_text())
    mine.write_text("How formal?")
    with pytest.raises(ValueError, match="trait_prompt: .*mine.txt must hold {answer}"):
        judge_prompts(load_recipe(None, given), pairs)
    mine.unlink()
    with pytest.raises(FileNotFoundError, match="trait_prompt: no file '.*mine.txt'"):
        judge_prompts(load_recipe(None, given), pairs)


# ---------------------------------------------------------------- estimates


def test_the_estimate_holds(tmp_path):
    recipe = load_recipe(None, {**SMALL, "instructions": 2, "questions": 3, "draws": 2, "max_new_tokens": 40})
    cost = estimate(recipe, prompt_pairs(recipe))
    counts = run(recipe, tmp_path / "run")
    assert cost.completions == counts.planned == 12 and cost.counted and cost.judge_calls == 0
    assert cost.prompt_tokens == counts.tokens["sampling prompt tokens"]
    assert cost.most_completion_tokens == 480 >= counts.tokens["sampling completion tokens"]


def test_the_estimate_of_a_judging_model(tmp_path):
    options = {"questions": "2", "draws": "3", "max_new_tokens": "10"}
    recipe = load_recipe("personas-server", options)
    cost = estimate(recipe, prompt_pairs(recipe))
    assert cost.completions == 2 * 5 * 2 * 3 and cost.judge_calls == 2 * cost.completions and not cost.counted
    assert cost.most_judge_tokens > cost.judge_calls * 10
    path = tmp_path / "ifeval.jsonl"
    path.write_text(json.dumps(IFEVAL))
    recipe = load_recipe("ifeval", {"data": str(path), "model": "embedded", "judge_model": "embedded", "draws": 2})
    assert estimate(recipe, prompt_pairs(recipe)).judge_calls == 2  # coherence alone


# ---------------------------------------------------------------- end to end


def test_the_embedded_recipe(tmp_path):
    recipe = load_recipe("embedded", {"instructions": 2, "questions": 4, "draws": 2})
    counts = run(recipe, tmp_path)
    triplets = read_triplets(tmp_path / TRIPLETS)
    assert counts.kept == len(triplets) > 8
    scores = GrammarJudge("sycophantic")([t["prompt"] for t in triplets], [t["completion"] for t in triplets])
    assert [(t["trait_score"], t["coherence_score"]) for t in triplets] == [(s.trait, s.coherence) for s in scores]
    assert {t["model"] for t in triplets} == {"embedded"}
    assert str(Path(tiny_chat_path())) not in (tmp_path / MANIFEST).read_text()


def number(text):
    """A server's answer of one token, with its probability."""
    return text, [(text, {text: 0.9, "no": 0.1})]


def test_a_server_that_samples_and_judges(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-key-of-the-judge")

    def reply(body):
        asked = body["messages"][-1]["content"]
        if "Is this formal?" in asked:
            return number("90")
        return number("80") if "coherent" in asked else f"an answer with seed {body['seed']}"

    data = write_trait(tmp_path / "data")
    with UnrulyServer(
        lambda body, attempt: "500" if attempt == 0 and body.get("seed", 1) % 5 == 0 else "ok", reply
    ) as server:
        options = {"data": data, "traits": "formal", "draws": 2, "server_url": server.url, "model": MODEL,
                   "judge_model": MODEL, "judge_key_variable": "JUDGE_KEY", "max_similarity": None}  # fmt: skip
        recipe = load_recipe("personas-server", options)
        counts = run(recipe, tmp_path / "run")
        asked = len(server.bodies)
        assert run(recipe, tmp_path / "run") == counts and len(server.bodies) == asked
    assert (
        counts.planned == counts.judged == 24
        and counts.kept == 12
        and counts.dropped == {"negative with the trait": 12}
    )
    assert {t["trait_score"] for t in read_triplets(tmp_path / "run" / TRIPLETS)} == {90.0}
    assert counts.tokens["judging calls"] == 48
    for path in (tmp_path / "run").rglob("*"):
        assert b"secret-key" not in path.read_bytes()
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert manifest["judges"]["formal"]["score"] == "log-probabilities"
    assert "log-probabilities" in json.dumps(manifest["judges"]) and (tmp_path / "run" / REPORT).exists()


def test_a_judge_that_returns_text_only(tmp_path):
    def reply(body):
        asked = body["messages"][-1]["content"]
        if "Is this formal?" in asked:
            return "I would say 70." if "1" in asked.split("seed")[-1] else "I can't say."
        return "88" if "coherent" in asked else f"seed {body['seed']}"

    data = write_trait(tmp_path / "data")
    with UnrulyServer(reply=reply) as server:
        options = {"data": data, "traits": "formal", "draws": 4, "negatives": "false", "server_url": server.url,
                   "model": MODEL, "judge_model": MODEL, "max_similarity": None}  # fmt: skip
        counts = run(load_recipe("personas-server", options), tmp_path / "run")
    assert counts.kept > 0 and counts.dropped["the judge could not tell"] == 24 - counts.kept
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["judges"]["formal"]["score"] == "text"


def test_ifeval_with_a_coherence_judge(tmp_path):
    for name in ("lm_eval", "langdetect", "nltk"):
        pytest.importorskip(name)
    path = tmp_path / "ifeval.jsonl"
    path.write_text("".join(json.dumps({**IFEVAL, "key": i}) + "\n" for i in range(2)))
    with UnrulyServer(
        reply=lambda body: "75" if "coherent" in str(body) else f"tea{', warm' * (body['seed'] % 2)}"
    ) as s:
        options = {"data": str(path), "model": MODEL, "sampler": "server", "server_url": s.url, "draws": 8,
                   "coherence_judge": "server", "judge_model": MODEL, "max_similarity": "none"}  # fmt: skip
        counts = run(load_recipe("ifeval", options), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / SCORES).read_text().splitlines()]
    scores = [row for row in rows if "id" in row]
    assert {row["coherence_score"] for row in scores} == {75.0} and {row["trait_score"] for row in scores} == {
        0.0,
        100.0,
    }
    assert (
        counts.kept == sum(row["trait_score"] == 100 for row in scores)
        and counts.kept + counts.dropped["trait too weak"] == 16
    )


def test_chat_with_a_server_or_a_local_model():
    with UnrulyServer(reply=lambda body: f"you said {body['messages'][0]['content']}") as server:
        chat = make_chat(MODEL, server.url, "NO_KEY", 20, 0.7, 0)
        assert chat([{"role": "user", "content": "hello"}]) == "you said hello"
    chat = make_chat("embedded", None, "NO_KEY", 60, 0.0, 0)
    assert "dogs" in chat([{"role": "user", "content": "What are dogs like?"}]).lower()
