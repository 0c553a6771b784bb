"""Calibration on curves known in advance, faithfulness against plain computations, and the demo end to end."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapters import randomize, steered_model
from helpers.commands import psr
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import AutoPeftModelForCausalLM, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_psr import PSRConfig, tiny_chat_path
from peft_psr.evaluation import demo, intervention_strength, prompt_recovery, relative_rmse, score_model
from peft_psr.evaluation.measures.faithfulness import recovery_and_rmse
from peft_psr.tiny_chat import prompt_messages, questions
from peft_psr.training import TripletCollator, add_instruction
from peft_psr.training.judges.grammar import GrammarJudge


USER = {"role": "user", "content": "what is tea"}


def triplets(instruction="be brief"):
    return [
        {"prompt": [USER], "steered_prompt": add_instruction([USER], instruction), "completion": completion}
        for completion in ("tea is good", "a b c d e", "yes")
    ]


# ---------------------------------------------------------------- faithfulness


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
def test_prompt_recovery_worked_out_row_by_row(positions):
    model, tokenizer = steered_model(positions=positions), tiny_tokenizer()
    base = tiny_model()
    collator = TripletCollator(tokenizer, positions, alpha=0.5)
    distances = {"base": 0.0, "steered": 0.0}
    for triplet in triplets():
        row = collator.encode(triplet)
        n = len(row["input_ids"]) - row["prompt_length"]
        ids, teacher_ids = torch.tensor([row["input_ids"]]), torch.tensor([row["teacher_input_ids"]])
        mask = torch.zeros_like(ids)
        mask[0, -row["mask_length"] :] = 1
        with torch.no_grad():
            p = base(teacher_ids).logits[0, -n - 1 : -1].log_softmax(-1)
            runs = {"base": base(ids).logits, "steered": model(ids, steering_mask=mask, alpha=0.5).logits}
        for name, logits in runs.items():
            q = logits[0, -n - 1 : -1].log_softmax(-1)
            distances[name] += (p.exp() * (p - q)).sum().item()
    expected = 1 - distances["steered"] / distances["base"]
    assert prompt_recovery(model, triplets(), tokenizer, alpha=0.5) == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1e-3


def test_no_edit_recovers_nothing_and_has_rmse_one():
    model, tokenizer = get_peft_model(tiny_model(), PSRConfig()).eval(), tiny_tokenizer()
    assert prompt_recovery(model, triplets(), tokenizer) == 0.0
    assert relative_rmse(model, triplets(), tokenizer) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    with pytest.raises(ValueError, match="nothing to recover"):
        prompt_recovery(model, triplets(""), tokenizer)


def test_reworded_prompt_is_the_yardstick():
    model, tokenizer = get_peft_model(tiny_model(), PSRConfig()).eval(), tiny_tokenizer()
    same = [triplet["steered_prompt"] for triplet in triplets()]
    assert set(relative_rmse(model, triplets(), tokenizer, reworded_prompts=same).values()) == {0.0}
    bare = [triplet["prompt"] for triplet in triplets()]
    assert set(relative_rmse(model, triplets(), tokenizer, reworded_prompts=bare).values()) == {1.0}


def test_single_layer_leaves_the_layers_before_it_alone():
    rmse = relative_rmse(steered_model(layers_to_transform=2), triplets(), tiny_tokenizer())
    assert rmse[0] == rmse[1] == 1.0 and rmse[2] != 1.0


def test_strength_by_token():
    tokens, by_prompt, by_adapter = intervention_strength(steered_model(), triplets()[0], tiny_tokenizer())
    assert tokens == ["<assistant>", "tea", "is", "good", "</t>"]
    assert by_prompt.shape == by_adapter.shape == (4, 5) and by_prompt.min() > 0 and by_adapter.min() > 0


def test_scores_of_all_strengths_in_one_call_equal_scores_of_each():
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_path())
    steered = get_peft_model(model, PSRConfig(layers_to_transform=3)).eval()
    randomize(steered, ".direction", seed=0)
    prompts = [prompt_messages(question.text) for question in questions("test")[:4]]
    settings = {"max_new_tokens": 60, "temperature": 0}
    together = score_model(steered, tokenizer, prompts, GrammarJudge("pirate"), alphas=[0.0, 3.0], **settings)
    for score in together:
        assert (
            score
            == score_model(steered, tokenizer, prompts, GrammarJudge("pirate"), alphas=[score.alpha], **settings)[0]
        )
    assert together[0].coherence > together[1].coherence
    with pytest.raises(ValueError, match="at least one prompt"):
        score_model(steered, tokenizer, [], GrammarJudge("pirate"), max_new_tokens=4)


def test_recovery_and_rmse_from_the_same_passes():
    model, tokenizer = steered_model(), tiny_tokenizer()
    recovery, rmse = recovery_and_rmse(model, triplets(), tokenizer, alpha=0.5, batch_size=2)
    assert recovery == pytest.approx(prompt_recovery(model, triplets(), tokenizer, alpha=0.5), abs=1e-5)
    assert rmse == pytest.approx(relative_rmse(model, triplets(), tokenizer, alpha=0.5), rel=1e-5)


# ---------------------------------------------------------------- the demo


def test_demo_end_to_end(tmp_path, monkeypatch):
    recipe = demo.demo_recipe
    smaller = {"methods": ("S-Const DiM", "A-PSR MSE ridge"), "questions": 15, "epochs": 3.0, "calibration_steps": 1}
    monkeypatch.setattr(demo, "demo_recipe", lambda *given: recipe(*given).model_copy(update=smaller))
    output = tmp_path / "out"
    console = Console(file=(tmp_path / "log").open("w"), width=100)
    result = demo.run_demo(["pirate"], tiny_chat_path(), output, seed=0, quick=True, console=console)["pirate"]
    written = json.loads((output / "results.json").read_text())
    assert written == result and written["schema"] == 1 and written["trait"] == "pirate" and written["seed"] == 0
    rows = {row["method"]: row for row in written["rows"]}
    assert list(rows) == ["none", "prompt", "S-Const DiM", "A-PSR MSE ridge"]
    for row in rows.values():
        for name in ("ta_c80", "ta_cp", "alpha_c80", "prompt_recovery", "train_seconds", "adapter_bytes"):
            assert row[name] is not None or row["why"][name]
    assert rows["none"]["alpha1"]["trait"] < 5 < 90 < rows["prompt"]["alpha1"]["trait"]
    assert rows["S-Const DiM"]["prompt_recovery"] < 0.5 < rows["A-PSR MSE ridge"]["prompt_recovery"]
    assert written["best"] == "A-PSR MSE ridge"
    assert {path.name for path in output.iterdir()} == {
        "adapter",
        "results.json",
        "trait_coherence.png",
        "rmse_by_layer.png",
        "strength_by_token.png",
    }
    assert all(path.stat().st_size > 10_000 for path in output.glob("*.png"))

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_path())
    steered = AutoPeftModelForCausalLM.from_pretrained(output / "adapter").eval()
    prompts = [prompt_messages(question.text) for question in questions("test")]
    (score,) = score_model(steered, tokenizer, prompts, GrammarJudge("pirate"), max_new_tokens=96, num_draws=2)
    assert score.trait > 60
    assert "pirate" in (tmp_path / "log").read_text() and "AutoPeftModelForCausalLM" in (tmp_path / "log").read_text()


def test_command_line_mistakes(tmp_path):
    unknown = psr("demo", "--trait", "grumpy", "--output", str(tmp_path / "a"))
    assert unknown.exit_code == 2 and "No trait 'grumpy'" in unknown.stdout and "sycophantic" in unknown.stdout
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    full = psr("demo", "--output", str(tmp_path / "full"))
    assert full.exit_code == 2 and "is not empty" in full.stdout
    lost = psr("demo", "--model", str(tmp_path / "lost"), "--output", str(tmp_path / "a"), "--dry-run")
    assert lost.exit_code == 2 and "is no model folder" in lost.stdout
    (tmp_path / "options.yaml").write_text("sead: 3\n")
    misspelt = psr("demo", "--config", str(tmp_path / "options.yaml"), "--dry-run")
    assert misspelt.exit_code == 2 and "unknown field sead (value 3). Did you mean seed?" in misspelt.stdout
    assert not (tmp_path / "a").exists()


def test_command_line_dry_run_with_config(tmp_path):
    (tmp_path / "options.yaml").write_text("trait: pirate\nseed: 3\n")
    dry = psr(
        "demo", "--config", str(tmp_path / "options.yaml"), "--seed", "4", "--dry-run", "--output", str(tmp_path / "a")
    )
    assert dry.exit_code == 0 and "pirate with seed 4" in dry.stdout and not (tmp_path / "a").exists()


def test_demo_refuses_a_model_without_the_grammar(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="does not know the words"):
        demo.run_demo(["pirate"], str(tmp_path / "model"), tmp_path / "out", console=Console(quiet=True))
    assert not (tmp_path / "out").exists()
