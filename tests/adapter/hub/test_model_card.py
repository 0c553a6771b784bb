"""Facts and model cards against what went in."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from helpers.adapters import BASE, FACTS, metadata, named_model, snippet
from helpers.hub import card_errors
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import PeftModel

from peft_psr import PSRConfig
from peft_psr.hub.facts import FACTS_NAME
from peft_psr.hub.model_card import FIGURE_NAME, render
from peft_psr.training import (
    AdapterFacts,
    Part,
    PSRTrainer,
    PSRTrainingArguments,
    Score,
    add_instruction,
    training_facts,
    write_model_card,
)


def test_facts_come_back_as_they_went_in(adapter):
    facts = replace(FACTS, parts=(Part("a", 1.0), Part("b", -0.5, "pirate")), versions={"x": "1"})
    facts.save(adapter)
    assert AdapterFacts.load(adapter) == facts
    AdapterFacts().save(adapter)
    assert AdapterFacts.load(adapter) == AdapterFacts()
    (adapter / FACTS_NAME).unlink()
    assert AdapterFacts.load(adapter) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"traits": "formal"}, "No such facts: traits"),
        ({"plain": {"trait": 120, "coherence": 90}}, "trait is a score from 0 to 100, got 120"),
        ({"curve": [{"trait": 1, "coherence": math.nan, "alpha": 1}]}, "coherence must be finite"),
        ({"curve": [{"trait": 1, "coherence": 2}]}, "needs its strength"),
        ({"triplets": -1}, "triplets"),
        ({"limits": "one text"}, "list of texts"),
        ([], "does not hold"),
    ],
)
def test_facts_that_can_not_be(adapter, values, message):
    (adapter / FACTS_NAME).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        AdapterFacts.load(adapter)


def test_facts_do_not_pass_to_other_weights(adapter):
    named_model(seed=5, layers_to_transform=[0, 2]).save_pretrained(adapter)
    with pytest.raises(ValueError, match="written for other weights"):
        write_model_card(adapter)


def test_card_says_what_is_known(adapter):
    text = write_model_card(adapter).read_text()
    data = metadata(text)
    assert card_errors(text) == []
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter" and data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation" and data["license"] == "apache-2.0"
    assert {"peft", "psr", "steering"} <= set(data["tags"])
    metrics = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"trait": 97.5, "coherence": 95.25, "prompt_recovery": 0.987}
    for line in (
        "| base model | – | 0.4 | 96.5 |",
        "| base model with the prompt | – | 98.2 | 97.1 |",
        "| this adapter | 1.25 | 97.5 | 95.2 |",
        "Judge: a grammar. Strength of this adapter: how it was chosen is not recorded.",
        "| strengths tried | 0.5 to 3 |",
        "| strength alpha, as saved | 1.25 |",
        "| edited | decoder layers 0, 2, counted from 0 |",
        "> Answer in a formal tone.",
        "- Not tried in Dutch.",
        "- Triplets (prompt, prompt with the instruction, completion): 195",
        f"![Trait and coherence as the strength grows]({FIGURE_NAME})",
    ):
        assert line in text
    assert "0.99" in text and "2605.03907" in text and "Heyman and Vandeputte" in text
    assert (adapter / FIGURE_NAME).read_bytes().startswith(b"\x89PNG")


def test_card_invents_nothing(adapter):
    write_model_card(adapter)
    (adapter / FACTS_NAME).unlink()
    text = write_model_card(adapter).read_text()
    assert card_errors(text) == [] and not (adapter / FIGURE_NAME).exists() and FIGURE_NAME not in text
    assert "license" not in metadata(text) and "model-index" not in metadata(text)
    assert text.count("not measured") == 4 and text.count("not recorded") == 6
    numbers = re.sub(r"(?s)```.*?```|<!--.*?-->|---.*?---", "", text)
    assert "97.5" not in numbers and "formal" not in numbers


def test_card_survives_hostile_texts():
    facts = AdapterFacts(
        trait="a\n---\nb: | c", question='say "no"\n```', judge="{{ config }} <!-- x", plain=Score(1, 2)
    )
    text = render(PSRConfig(base_model_name_or_path=BASE), facts, "me/x")
    assert card_errors(text) == [] and metadata(text)["base_model"] == BASE
    assert "# Steering adapter: a --- b: / c" in text.splitlines()
    assert "{{ config }}" in text and compile(snippet(text), "card", "exec")


def test_own_card_is_kept(adapter):
    card = write_model_card(adapter)
    write_model_card(adapter)  # nobody has touched it
    card.write_text(card.read_text().replace("## Limits", "## Limits\n\n- Mine."))
    with pytest.raises(FileExistsError, match="is your own"):
        write_model_card(adapter)
    assert "- Mine." in card.read_text()
    assert "- Mine." not in write_model_card(adapter, overwrite=True).read_text()
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mit"))
    with pytest.raises(FileExistsError, match="is your own"):
        write_model_card(adapter)


def test_saving_with_peft_does_not_make_a_card_ones_own(adapter):
    write_model_card(adapter)
    named_model(alpha=1.25, layers_to_transform=[0, 2]).save_pretrained(adapter)
    assert "### Framework versions" in (adapter / "README.md").read_text()
    assert "### Framework versions" not in write_model_card(adapter).read_text()


def test_snippet_of_a_local_card_runs(tmp_path, adapter, monkeypatch, capsys):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    text = write_model_card(adapter).read_text()
    assert str(tmp_path) not in text and "base_model" not in metadata(text)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(snippet(text), scope)
    assert isinstance(scope["model"], PeftModel) and scope["answer"].numel() > 0
    expected = scope["model"].generate(**scope["prompt"], max_new_tokens=100)
    assert expected[0].tolist()[-scope["answer"].numel() :] == scope["answer"].tolist()
    assert capsys.readouterr().out.strip() == scope["tokenizer"].decode(scope["answer"], skip_special_tokens=True)


def test_facts_of_a_training_run(tmp_path):
    user = {"role": "user", "content": "what is tea"}
    triplet = {"prompt": [user], "steered_prompt": add_instruction([user], "be brief"), "completion": "tea is good"}
    arguments = PSRTrainingArguments(str(tmp_path), objective={"mse": 1.0, "ll": 0.1}, seed=11, alpha=1.0)
    trainer = PSRTrainer(named_model(), arguments, [triplet] * 3, processing_class=tiny_tokenizer())
    facts = training_facts(trainer, trait="brief")
    assert (facts.trait, facts.objective, facts.triplets, facts.seed) == ("brief", "mse + 0.1 ll", 3, 11)
    assert set(facts.versions) == {"peft-psr", "peft", "transformers", "torch"} and facts.steered is None
    assert training_facts(trainer, seed=12).seed == 12
