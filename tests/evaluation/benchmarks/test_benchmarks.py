"""benchmarks/: every variant computes the edit it is timed for; ratios and counts are right. No time is asserted."""

import json

import inference
import pytest
import torch
import training_step
import variants
from helpers.reference import naive_logits
from timing import Workload, count_operations, median_interval, ratio, static_cache
from transformers import DynamicCache


PROMPT, LENGTH = 5, 8


@pytest.fixture(scope="module")
def base():
    return variants.build_model("tiny")


def tokens(batch):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(variants.SHAPES["tiny"]["vocab_size"], (batch, LENGTH), generator=generator)


def build(name, base, batch):
    try:
        return inference.BUILDERS[name](base, batch)
    except ImportError as error:
        pytest.skip(f"{name}: {error}; benchmarks/README.md says how to install it")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", inference.BUILDERS)
def test_every_variant_computes_its_edit(name, batch, base):
    variant, ids = build(name, base, batch), tokens(batch)
    got = variants.logits_of(variant, ids, PROMPT, DynamicCache(config=base.config))
    mask = [0 if variant.positions == "response" and i < PROMPT - 1 else 1 for i in range(LENGTH)]
    for row in range(batch):
        edit = variant.edits[row % len(variant.edits)]
        expected = naive_logits(base, ids[row].tolist(), edit, mask, 1.0)[PROMPT - 1 :]
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", inference.BUILDERS)
def test_generate_is_steered_alike(name, base):
    variant, ids = build(name, base, 2), tokens(2)[:, :PROMPT]
    got = variant.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, min_new_tokens=3
    )
    for row in range(2):
        ids_of_row = ids[row].tolist()
        for position in range(PROMPT, PROMPT + 3):
            mask = [0 if variant.positions == "response" and i < PROMPT - 1 else 1 for i in range(position)]
            logits = naive_logits(base, ids_of_row, variant.edits[row % len(variant.edits)], mask, 1.0)
            ids_of_row.append(int(logits[-1].argmax()))
        assert got[row].tolist() == ids_of_row


def test_edits_differ_and_show(base):
    """What the comparison rests on: edits large enough to see, gates open on some tokens and shut on others."""
    ids = tokens(1)
    unedited = variants.reference_logits(base, [{}], ids, PROMPT)
    for edit in (variants.random_edit(base), variants.random_edit(base, gate="constant")):
        edited = variants.reference_logits(base, [edit], ids, PROMPT)
        assert (edited - unedited).norm() > 0.1 * unedited.norm()
    first, second = variants.random_edit(base, seed=0), variants.random_edit(base, seed=1)
    assert not torch.equal(first[0][2], second[0][2])
    w, b, _ = first[0]
    open_gates = (base.model.layers[0](base.model.embed_tokens(ids), **rotary(base)) @ w.T + b > 0).float().mean()
    assert 0.0 < open_gates < 1.0


def rotary(base):
    positions = torch.arange(LENGTH)[None]
    return {"position_embeddings": base.model.rotary_emb(base.model.embed_tokens(positions), position_ids=positions)}


def test_a_wrong_edit_is_noticed(base, monkeypatch):
    """A variant that skips the last layer is left out, with the reason, and not timed."""

    def one_layer_short(base, batch):
        variant = variants.VARIANTS["naive-hook"](base, batch)
        variant.edits = [{**variant.edits[0], 2: variants.random_edit(base, seed=9)[2]}]
        return variant

    monkeypatch.setitem(inference.BUILDERS, "naive-hook", one_layer_short)
    arguments = ["--model", "tiny", "--rounds", "1", "--new-tokens", "2", "--prompt-length", "4"]
    (section,) = inference.main([*arguments, "--only", "naive-hook"])["sections"]
    assert "differ from the reference" in section["skipped"]["naive-hook"]
    assert list(section["seconds"]) == ["base"]


def test_variants_share_parameters_but_not_hooks(base):
    hooked = variants.VARIANTS["naive-hook"](base, 1).forward.__self__
    assert hooked.model.layers[0]._forward_hooks and not base.model.layers[0]._forward_hooks
    assert hooked.model.layers[0].mlp.up_proj.weight is base.model.layers[0].mlp.up_proj.weight


def test_static_cache_gives_the_same_logits(base):
    ids = tokens(2)
    variant = variants.VARIANTS["a-psr"](base, 2)
    cache = static_cache(base, Workload(ids[:, :PROMPT], LENGTH - PROMPT))
    expected = variants.logits_of(variant, ids, PROMPT, DynamicCache(config=base.config))
    torch.testing.assert_close(variants.logits_of(variant, ids, PROMPT, cache), expected, rtol=1e-4, atol=1e-5)


def test_ratios_are_taken_round_by_round():
    base = [1.0, 10.0, 100.0]  # a machine that slows down
    assert ratio([1.1, 11.0, 110.0], base).median == pytest.approx(1.1)
    assert ratio([1.1, 11.0, 110.0], base, over=[1.05, 10.5, 105.0]).median == pytest.approx(0.05)
    interval = median_interval([1.0] * 40 + [50.0])
    assert (interval.low, interval.median, interval.high) == (1.0, 1.0, 1.0)
    spread = median_interval([float(i) for i in range(101)])
    assert 30 < spread.low < spread.median == 50 < spread.high < 70


def test_operations_are_counted(base):
    """The plain edit is a product, a sum, a gate, a product and a sum a layer; views are free."""
    task = Workload(tokens(1), 1)
    counts = {name: count_operations(base, variants.VARIANTS[name](base, 1), task) for name in ("base", "empty-hook")}
    assert counts["base"] == counts["empty-hook"] > 3 * 7
    naive = count_operations(base, variants.VARIANTS["naive-hook"](base, 1), task)
    assert naive - counts["base"] == 3 * 5


def test_floor(base):
    """Against a count by hand: 3 layers of 32 features, 2 heads of 8 cached, 64 words, 2 rows, 6 + 4 tokens."""
    work = inference.floor(base, Workload(tokens(2)[:, :6], 4))["decode"]
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    model = 3 * layer + 64 * 32
    assert work["operations"] == pytest.approx(3 * 4 * 32 / (2 * model + 3 * 4 * 32 * 8))
    assert work["edit_bytes"] == 3 * (2 * 32 * 2 * 4 + 65 * 4)
    assert work["model_bytes"] == 4 * model + 3 * 2 * 2 * 8 * 2 * 8 * 4


def test_command_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "inference.json"
    arguments = ["--model", "tiny", "--rounds", "2", "--batch", "1", "2", "--new-tokens", "2", "--prompt-length", "4"]
    inference.main([*arguments, "--only", "empty-hook", "a-psr", "mixed", "--generate", "--output", str(path)])
    sections = json.loads(path.read_text())["sections"]
    assert [section["batch"] for section in sections] == [1, 2]
    for section in sections:
        assert list(section["seconds"]) == ["base", "empty-hook", "a-psr", "mixed"]
        for quantities in section["seconds"].values():
            assert {name: len(values) for name, values in quantities.items()} == {
                "prefill": 2,
                "decode": 2,
                "generate": 2,
            }
    printed = capsys.readouterr().out
    assert "| a-psr |" in printed and "Floor of the rank-1 edit" in printed


def test_bad_arguments_say_so(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


def test_an_epoch_is_compared_with_the_floor_of_its_own_round():
    times = {
        training_step.FLOOR: [(None, 1.0), (None, 4.0), (None, 2.0)],
        "ours": [(9.0, 2.0), (5.0, 4.0), (7.0, 6.0)],
    }
    lines = training_step.table(times, tokens=100).splitlines()
    assert lines[-1] == "| ours | 4.00 | 25 | 2.00 | 7.00 |"
    assert lines[-2].endswith("| 2.00 | 50 | 1.00 | – |")
