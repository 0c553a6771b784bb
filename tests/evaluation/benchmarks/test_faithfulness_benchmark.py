"""The faithfulness benchmark: movements against plain runs with hooks, and all of it on the embedded model."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapters import randomize, steered_model
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import USER, triplets
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

from peft_psr.evaluation import prompt_recovery, relative_rmse
from peft_psr.evaluation.benchmarks.cell import Cell
from peft_psr.evaluation.benchmarks.faithfulness import benchmark as faithfulness_benchmark
from peft_psr.evaluation.benchmarks.faithfulness.benchmark import (
    check_faithfulness,
    measure,
    reworded_prompts,
    run_faithfulness,
)
from peft_psr.evaluation.benchmarks.faithfulness.recipe import FaithfulnessRecipe
from peft_psr.evaluation.benchmarks.faithfulness.report import control_rows, faithfulness_report, layer_rmse
from peft_psr.evaluation.benchmarks.recipe import load_evaluate_recipe
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.measures.movement import (
    Movement,
    movements,
    neutral_sums,
    position_groups,
    squared_errors,
    strengths,
    token_correlations,
)
from peft_psr.training import PromptPair, TripletCollator, add_instruction


REWORDED, NEUTRAL = add_instruction([USER], "be good"), add_instruction([USER], "what")


def lora_model():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).eval()
    return randomize(model, "lora_B", seed=3, std=0.1)


def moved(model, alpha=0.5, neutral=NEUTRAL, batch_size=3):
    rows = triplets()
    prompts = [neutral] * len(rows), [REWORDED] * len(rows)
    return list(movements(model, rows, tiny_tokenizer(), *prompts, alpha=alpha, batch_size=batch_size))


def plain_streams(ids):
    """(layers, seq, d) of the plain model, by hooks."""
    model, found = tiny_model(), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, __, output: found.append(output if torch.is_tensor(output) else output[0])
        )
    with torch.no_grad():
        model(torch.tensor([ids]))
    return torch.stack([hidden[0] for hidden in found])


# ---------------------------------------------------------------- what moves


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
def test_differences_worked_out_row_by_row(positions):
    found = moved(steered_model(positions=positions))
    for triplet, movement in zip(triplets(), found, strict=True):
        runs = {}
        for name, prompt in {"prompt": triplet["steered_prompt"], "neutral": NEUTRAL, "reworded": REWORDED}.items():
            row = TripletCollator(tiny_tokenizer(), positions, 1.0).encode({**triplet, "steered_prompt": prompt})
            runs[name] = plain_streams(row["teacher_input_ids"])[:, -row["mask_length"] :]
        base = plain_streams(row["input_ids"])[:, -row["mask_length"] :]
        torch.testing.assert_close(movement.base, base)
        for name, hidden in runs.items():
            delta = movement.prompt if name == "prompt" else movement.others[name]
            torch.testing.assert_close(delta, hidden - base, atol=1e-4, rtol=1e-4)
        assert movement.tokens.tolist() == row["input_ids"][-row["mask_length"] :]
        first = row["input_ids"].index(tiny_tokenizer().convert_tokens_to_ids("<assistant>"))
        before = row["mask_length"] - (len(row["input_ids"]) - first)
        assert movement.places.tolist() == list(range(-before, row["mask_length"] - before))
        assert movement.tokens[movement.places == 0].tolist() == [row["input_ids"][first]]


@pytest.mark.parametrize("make", [steered_model, lora_model])
def test_sums_are_those_of_prompt_recovery_and_relative_rmse(make):
    model, tokenizer = make(), tiny_tokenizer()
    found = moved(model)
    recovery = 1 - sum(m.kl["steered"] for m in found) / sum(m.kl["base"] for m in found)
    assert recovery == pytest.approx(prompt_recovery(model, triplets(), tokenizer, alpha=0.5), abs=1e-4)
    sums = {name: sum(squared_errors(m)[name] for m in found) for name in ("prompt", "steered", "reworded")}
    expected = {
        "steered": relative_rmse(model, triplets(), tokenizer, alpha=0.5),
        "reworded": relative_rmse(model, triplets(), tokenizer, reworded_prompts=[REWORDED] * len(triplets())),
    }
    for name, rmse in expected.items():
        assert (sums[name] / sums["prompt"]).sqrt().tolist() == pytest.approx(list(rmse.values()), rel=1e-3)
    assert abs(recovery) > 1e-3


def test_an_instruction_as_its_own_control_moves_all_that_the_prompt_moves():
    same = moved(steered_model(), neutral=triplets()[0]["steered_prompt"])
    for movement in same:
        for neutral, prompt, dot in neutral_sums(movement).values():
            torch.testing.assert_close(neutral, prompt)
            torch.testing.assert_close(dot, prompt)
        assert movement.kl["neutral"] == pytest.approx(0.0, abs=1e-5)
        assert token_correlations(movement)["edit_prompt_given_neutral"] is None
    for movement in moved(steered_model(), neutral=[USER]):
        assert all(sums[0].max() == 0 for sums in neutral_sums(movement).values())
        assert movement.kl["neutral"] == pytest.approx(movement.kl["base"])


def test_groups_of_tokens_by_place():
    groups = position_groups(torch.arange(-2, 20))
    places = {name: (torch.arange(-2, 20)[chosen]).tolist() for name, chosen in groups.items()}
    assert places == {
        "last prompt token": [0],
        "token 1": [1],
        "tokens 2-4": [2, 3, 4],
        "tokens 5-16": list(range(5, 17)),
        "later tokens": [17, 18, 19],
    }


def made_up(layers=2, tokens=9, d=4):
    torch.manual_seed(1)
    base, prompt, steered, neutral = torch.randn(4, layers, tokens, d)
    steered[0, :3] = 0  # closed gates: equal values among the ranks
    return Movement(
        torch.arange(tokens), torch.arange(tokens), base, prompt, {"steered": steered, "neutral": neutral}, {}
    )


def test_correlations_against_scipy():
    movement = made_up()
    expected = {name: [] for name in token_correlations(movement)}
    for layer in range(2):
        deltas = (movement.prompt, movement.others["steered"], movement.others["neutral"])
        prompt, edit, neutral = (delta[layer].norm(dim=-1).numpy() for delta in deltas)
        with_prompt, with_neutral, between = (
            spearmanr(a, b).statistic for a, b in ((edit, prompt), (edit, neutral), (prompt, neutral))
        )
        partial = (with_prompt - with_neutral * between) / ((1 - with_neutral**2) * (1 - between**2)) ** 0.5
        values = {"prompt_neutral": between, "edit_prompt": with_prompt, "edit_neutral": with_neutral}
        for name, value in {**values, "edit_prompt_given_neutral": partial}.items():
            expected[name].append(value)
    for name, value in token_correlations(movement).items():
        assert value == pytest.approx(sum(expected[name]) / 2, abs=1e-6) and abs(value) > 1e-3


def test_an_edit_that_is_everywhere_the_same_has_no_correlation():
    movement = made_up()
    movement.others["steered"][:] = torch.ones(4)
    movement.others["steered"].add_(1e-5 * torch.randn(2, 9, 4))  # as rounding makes it
    found = token_correlations(movement)
    assert found["edit_prompt"] is None and found["edit_neutral"] is None and found["prompt_neutral"] is not None
    short = made_up(tokens=3)
    assert set(token_correlations(short).values()) == {None}


def test_sums_of_each_group_against_loops():
    movement = made_up(tokens=19)
    groups = {"last prompt token": [0], "tokens 2-4": [2, 3, 4], "later tokens": [17, 18]}
    for name, places in groups.items():
        for layer in range(2):
            pairs = [(movement.others["neutral"][layer, i], movement.prompt[layer, i]) for i in places]
            expected = [
                sum((a * b).sum() for a, b in of_each)
                for of_each in ([(n, n) for n, _ in pairs], [(p, p) for _, p in pairs], pairs)
            ]
            assert neutral_sums(movement)[name][:, layer].tolist() == pytest.approx(
                [x.item() for x in expected], rel=1e-4
            )


def test_strength_is_relative_to_the_stream():
    movement = made_up()
    expected = movement.prompt[1, 2].norm() / movement.base[1, 2].norm()
    assert strengths(movement)["prompt"][1, 2] == pytest.approx(expected.item())


# ---------------------------------------------------------------- what is kept and reported


def test_reworded_prompts_are_the_next_instruction_of_the_same_prompt():
    other = [{"role": "user", "content": "what are dogs"}]
    pairs = [
        PromptPair(f"t/{i}/{q}", "t", prompt, add_instruction(prompt, instruction))
        for i, instruction in enumerate(["be brief", "be good", "be now"])
        for q, prompt in enumerate([[USER], other])
    ]
    rows = [{"prompt": p.prompt, "steered_prompt": p.steered_prompt, "completion": "yes"} for p in pairs]
    found = reworded_prompts(rows, pairs)
    assert found == [p.steered_prompt for p in (*pairs[2:], *pairs[:2])]
    assert reworded_prompts(rows[:1], pairs[:1]) is None


def test_measured_sums_by_prompt_and_the_tables_made_of_them():
    model, tokenizer = steered_model(), tiny_tokenizer()
    other = [{"role": "user", "content": "what are dogs"}]
    rows = triplets() + [
        {"prompt": other, "steered_prompt": add_instruction(other, "be brief"), "completion": "dogs are good yes"}
    ]
    neutral = [add_instruction(row["prompt"], "what") for row in rows]
    result = json.loads(json.dumps(measure(model, tokenizer, rows, neutral, None, 1.0)))
    assert len(result["prompts"]) == 2 and result["layers"] == [0, 1, 2, 3]
    cell = Cell("m", "t", "A-PSR MSE", 0, {"alpha": 1.0}, result)
    rmse = layer_rmse([cell], "steered")
    assert list(rmse.values()) == pytest.approx(list(relative_rmse(model, rows, tokenizer).values()), rel=1e-3)
    control = control_rows([cell])
    assert control["last prompt token"]["neutral size"].mean > 0 and control["later tokens"]["prompt"].mean is None
    assert -1 <= control["token 1"]["cosine"].low <= control["token 1"]["cosine"].mean <= 1
    recipe = load_evaluate_recipe(FaithfulnessRecipe, None, SMALL)
    report = faithfulness_report(recipe, [cell])
    table = report.tables[0].rows
    assert table["A-PSR MSE"]["prompt recovery"].mean == pytest.approx(
        prompt_recovery(model, rows, tokenizer), abs=1e-4
    )
    assert table["A-PSR MSE"]["RMSE, mean of layers"].mean == pytest.approx(sum(rmse.values()) / 4)
    assert table["reworded prompt"]["prompt recovery"].why == "every prompt has but one instruction"
    assert table["neutral instruction"]["prompt recovery"].mean is not None
    json.dumps(report.results, allow_nan=False)


SMALL = {
    "source": "embedded", "models": "embedded", "judge": "grammar", "traits": "pirate", "methods": "S-Const DiM",
    "instructions": 2, "questions": 3, "draws": 1, "max_new_tokens": 60, "min_trait_score": 0,
    "min_coherence_score": 0,
}  # fmt: skip


@pytest.mark.parametrize("positions", ["response", "question_and_response"])
def test_gates_of_the_example_are_those_at_its_strength(positions):
    model, tokenizer, rows = steered_model(positions=positions), tiny_tokenizer(), triplets()
    randomize(model, ".gate_weight")  # gates that the edits of earlier layers move
    collator = TripletCollator(tokenizer, positions, alpha=3.0)
    batch = collator([collator.encode(rows[0])])
    length = int((batch["labels"] != -100).sum()) + 1  # the last prompt token too
    seen = {}
    for alpha in (1.0, 3.0):
        example = measure(model, tokenizer, rows, [NEUTRAL] * len(rows), None, alpha)["example"]
        assert len(example["tokens"]) == length
        seen[alpha] = torch.tensor(list(example["gates"].values()))
        with model.alpha_scale(alpha):
            gates = model.gate_values(batch["input_ids"], steering_mask=batch["steering_mask"])
        wanted = torch.stack([values[0, -length:].sum(dim=-1) for values in gates.values()])
        torch.testing.assert_close(seen[alpha], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[1.0], seen[3.0])


def bench_in(folder, **options):
    recipe = load_evaluate_recipe(FaithfulnessRecipe, None, SMALL | options)
    return Workbench(recipe, folder, "faithfulness")


def test_on_the_embedded_model_and_again(tmp_path, monkeypatch):
    def run(**options):
        bench = bench_in(tmp_path / "run", **options)
        check_faithfulness(bench)
        with bench.open():
            return run_faithfulness(bench)

    first = run()
    table = first.tables[0].rows
    assert list(table) == ["reworded prompt", "neutral instruction", "S-Const DiM"]
    assert table["reworded prompt"]["prompt recovery"].mean > 0.9 > 0.3 > table["S-Const DiM"]["prompt recovery"].mean
    assert table["reworded prompt"]["RMSE, mean of layers"].mean < 0.5
    assert abs(table["neutral instruction"]["prompt recovery"].mean) < 0.3
    sizes = {name: row["neutral size"].mean for name, row in first.tables[1].rows.items() if row["prompt"].mean}
    assert all(0 < size < 1 for size in sizes.values())
    assert set(first.figures) == {"gates_pirate", "rmse_by_layer", "strength_by_place", "strength_by_token_pirate"}
    assert "'Answer the question.'" in first.description

    measured = []
    monkeypatch.setattr(  # what was measured is not measured again
        faithfulness_benchmark, "measure", lambda *given: measured.append(given[-1]) or measure(*given)
    )
    more = run(alphas="1,2")
    assert measured == [2.0]
    assert [cell["alpha"] for cell in more.results["cells"]] == [1.0, 2.0]
    assert more.results["cells"][0] == first.results["cells"][0]
    assert list(more.tables[0].rows)[2:] == ["S-Const DiM, alpha 1", "S-Const DiM, alpha 2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "none"}, "name a method, or give adapters"),
        ({"neutral_instruction": " "}, "neutral_instruction is blank"),
        ({"neutral_instruction": "Consider quarks."}, "does not know all words of 'Consider quarks.'; 'Answer the"),
        ({"alphas": "0"}, "alphas"),
    ],
)
def test_what_is_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        check_faithfulness(bench_in(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
