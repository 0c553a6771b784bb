"""The adapter type against the naive reference: every variant, layout, padding side, with and without cache."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapters import steered, weights_of
from helpers.models import LAYERS, LAYOUTS, PROMPTS, WIDTH, cache_argument, pad, tiny_model
from helpers.reference import decoder_layers, naive_greedy, naive_logits
from peft import get_peft_model

from peft_psr import PSRConfig
from peft_psr.base_model.caches import cache_of


def logits_at_tokens(logits, attention_mask):
    return [row[mask.bool()] for row, mask in zip(logits, attention_mask, strict=True)]


def expected_mask(positions, row):
    return [0] * (len(row) - 1) + [1] if positions == "response" else [1] * len(row)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["relu", "constant"])
@pytest.mark.parametrize("layers", [None, 1, [0, 2]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_equals_reference(layout, gate, layers, side):
    base = tiny_model(layout)
    model = steered(copy.deepcopy(base), gate=gate, layers_to_transform=layers, r=2, alpha=0.7, coefficient_bias=-0.2)
    ids, attention_mask = pad(PROMPTS, side)
    positions = {} if layout == "llama" else {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=attention_mask, **positions).logits
    plain = base(input_ids=ids, attention_mask=attention_mask, **positions).logits
    assert (out - plain).abs().max() > 1e-2
    for row, got in zip(PROMPTS, logits_at_tokens(out, attention_mask), strict=True):
        want = naive_logits(base, row, weights_of(model), expected_mask("response", row), 0.7 - 0.2)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["response", "question_and_response", "all"])
def test_positions_without_a_mask(positions):
    base = tiny_model()
    model = steered(copy.deepcopy(base), positions=positions)
    for row in PROMPTS:
        want = naive_logits(base, row, weights_of(model), expected_mask(positions, row), 1.0)
        torch.testing.assert_close(model(torch.tensor([row])).logits[0], want, atol=2e-4, rtol=1e-4)


def test_labels_name_the_response_and_the_token_before_it():
    base = tiny_model()
    model = steered(copy.deepcopy(base))
    row = PROMPTS[0]
    labels = torch.tensor([[-100, -100, -100, *row[3:]]])
    want = naive_logits(base, row, weights_of(model), [0, 0, 1, 1, 1, 1], 1.0)
    out = model(input_ids=torch.tensor([row]), labels=labels)
    torch.testing.assert_close(out.logits[0], want, atol=2e-4, rtol=1e-4)


def test_last_prompt_token_is_edited_and_the_one_before_is_not():
    base = tiny_model()
    model = steered(copy.deepcopy(base), layers_to_transform=1, gate="constant")
    ids = torch.tensor([PROMPTS[0]])
    plain = base(ids, output_hidden_states=True).hidden_states[2]
    change = model(ids, output_hidden_states=True).hidden_states[2] - plain
    assert torch.equal(change[0, :-1], torch.zeros_like(change[0, :-1]))
    assert change[0, -1].abs().max() > 1e-3


def test_explicit_mask_wins():
    base = tiny_model()
    model = steered(copy.deepcopy(base))
    mask = [0, 1, 0, 1, 1, 0]
    out = model(torch.tensor([PROMPTS[0]]), steering_mask=torch.tensor([mask])).logits[0]
    torch.testing.assert_close(out, naive_logits(base, PROMPTS[0], weights_of(model), mask, 1.0), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_reference(layout, use_cache):
    base = tiny_model(layout)
    model = steered(copy.deepcopy(base), layers_to_transform=[1, 2])
    ids, attention_mask = pad(PROMPTS, "left")
    out = model.generate(
        input_ids=ids,
        attention_mask=attention_mask,
        max_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
    )
    for row, got in zip(PROMPTS, out[:, ids.shape[1] :].tolist(), strict=True):
        assert got == naive_greedy(base, row, weights_of(model), 1.0, 8)


def test_generation_with_mask_agrees_with_and_without_cache_and_with_a_forward_call():
    model = steered(tiny_model(), positions="question_and_response")
    ids = torch.tensor([PROMPTS[0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids, steering_mask=mask, **settings)
    assert torch.equal(cached, model.generate(input_ids=ids, steering_mask=mask, use_cache=False, **settings))
    full = torch.cat([mask, torch.ones(1, 5, dtype=torch.long)], dim=1)
    assert model(cached[:, :-1], steering_mask=full).logits[0, -6:].argmax(-1).tolist() == cached[0, -6:].tolist()
    assert not torch.equal(cached, model.generate(input_ids=ids, **settings))


def test_generation_takes_the_prompt_by_any_name_and_continues_a_cache():
    model = steered(tiny_model())
    ids = torch.tensor([PROMPTS[0]])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **settings)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)
    assert torch.equal(model.generate(inputs=ids, use_cache=False, **settings), expected)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), expected[:, ids.shape[1] :])
    cache = cache_of(model(ids[:, :-2], steering_mask=torch.zeros_like(ids[:, :-2]), use_cache=True))
    assert torch.equal(model.generate(input_ids=ids, **cache_argument(model, cache), **settings), expected)


def test_right_padding_edits_the_last_real_token():
    model = steered(tiny_model())
    ids, attention_mask = pad(PROMPTS, "right")
    together = model(input_ids=ids, attention_mask=attention_mask).logits
    for i, row in enumerate(PROMPTS):
        torch.testing.assert_close(together[i, : len(row)], model(torch.tensor([row])).logits[0])


def test_several_sequences_and_beams_repeat_the_mask():
    model = steered(tiny_model())
    ids, attention_mask = pad(PROMPTS, "left")
    mask = torch.zeros_like(ids)
    mask[0, -2:] = 1
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    batched = model.generate(
        input_ids=ids, attention_mask=attention_mask, steering_mask=mask, num_return_sequences=2, **settings
    )
    for i, row in enumerate(PROMPTS):
        alone = model.generate(
            input_ids=torch.tensor([row]),
            steering_mask=mask[i : i + 1, -len(row) :],
            num_return_sequences=2,
            **settings,
        )
        assert torch.equal(batched[2 * i : 2 * i + 2, -5:], alone[:, -5:])


def test_alpha_of_a_call_and_of_each_row():
    model = steered(tiny_model(), alpha=0.3)
    ids = torch.tensor([PROMPTS[0], PROMPTS[0]])
    mixed = model(ids, alpha=[0.0, 2.0]).logits
    with model.disable_adapter():
        assert torch.equal(mixed[0], model(ids).logits[0])
    model.set_alpha(2.0)
    torch.testing.assert_close(mixed[1], model(ids).logits[1])
    with model.alpha_scale(0.0), model.disable_adapter():
        base = model(ids).logits
    with model.alpha_scale(0.0):
        assert torch.equal(model(ids).logits, base)
    out = model.generate(input_ids=ids, alpha=[0.0, 2.0], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(
        out[1:], model.generate(input_ids=ids[1:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    )
    with model.disable_adapter():
        plain = model.generate(input_ids=ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(out[:1], plain)


def test_new_adapter_is_a_no_op_with_live_gates_and_gets_gradients():
    base = tiny_model()
    ids = torch.tensor([PROMPTS[0]])
    before = base(ids).logits
    model = get_peft_model(base, PSRConfig())
    assert torch.equal(model(ids).logits, before)
    assert all(bool((values == 1).all()) for values in model.gate_values(ids).values())
    model(ids, steering_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(layer.psr_unit["default"].direction.grad.abs().max() > 0 for layer in model.psr_layers().values())
    assert all(name.find("psr_unit") >= 0 for name, p in model.named_parameters() if p.requires_grad)


def test_linear_start_is_within_the_bound():
    model = get_peft_model(tiny_model(), PSRConfig(init_weights=False, r=3))
    for layer in model.psr_layers().values():
        for parameter in layer.psr_unit["default"].parameters():
            assert 0 < parameter.abs().max() <= WIDTH**-0.5


def test_disabled_adapter_and_unload_are_bit_equal():
    base = tiny_model()
    ids = torch.tensor([PROMPTS[0]])
    before, keys = base(ids).logits, list(base.state_dict())
    model = steered(base)
    assert not torch.equal(model(ids).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(model(ids).logits, before)
    unloaded = model.unload()
    assert unloaded is base and torch.equal(base(ids).logits, before) and list(base.state_dict()) == keys
    assert not base._forward_pre_hooks and not decoder_layers(base)[0]._forward_hooks


def test_merging_is_refused_before_anything_changes():
    model = steered(tiny_model())
    with pytest.raises(ValueError, match="can't be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="can't be merged"):
        model.merge_adapter()
    assert len(model.psr_layers()) == LAYERS


def test_hidden_states_show_the_edit_and_gate_values_match():
    base = tiny_model()
    model = steered(copy.deepcopy(base), layers_to_transform=[0], positions="all", r=2)
    ids = torch.tensor([PROMPTS[0]])
    hidden = base(ids, output_hidden_states=True).hidden_states[1][0]
    w, b, z = weights_of(model)[0]
    gates = torch.relu(hidden @ w.T + b)
    torch.testing.assert_close(model.gate_values(ids)[0][0], gates)
    torch.testing.assert_close(model(ids, output_hidden_states=True).hidden_states[1][0], hidden + gates @ z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_keeps_float32_adapter(dtype):
    base = tiny_model().to(dtype)
    model = steered(base)
    ids = torch.tensor([PROMPTS[0]])
    assert model(ids).logits.dtype == dtype
    model.to(dtype)
    assert {p.dtype for n, p in model.named_parameters() if "psr_unit" in n} == {torch.float32}
    hidden = torch.randn(1, 3, WIDTH).to(dtype)
    model.base_model.model._psr_state.masks = {}
    unit, layer = model.psr_layers()[0].psr_unit["default"], model.psr_layers()[0]
    exact = hidden.float() + torch.relu(hidden.float() @ unit.gate_weight.T + unit.gate_bias) @ unit.direction
    assert torch.equal(layer(hidden), exact.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(hidden), exact.to(dtype))


def test_a_layer_called_by_itself_takes_the_strength_of_now():
    model = get_peft_model(tiny_model(), PSRConfig(init_weights=False, gate="constant", positions="all"))
    layer = model.psr_layers()[1]
    hidden = torch.zeros(1, 1, layer.width)
    model(torch.tensor([[9]]))
    once = layer(hidden)
    model.set_alpha(3.0)
    torch.testing.assert_close(layer(hidden), 3 * once)
    with model.alpha_scale(0.5):
        torch.testing.assert_close(layer(hidden), 1.5 * once)
    torch.testing.assert_close(layer(hidden), 3 * once)


def test_ranks_of_a_no_op_start_do_not_stay_equal():
    model = get_peft_model(tiny_model(), PSRConfig(r=3, layers_to_transform=1))
    ids = torch.tensor([[1, 9, 12, 17]])
    unit = model.psr_layers()[1].unit("default")
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base)
    assert (unit.direction == 0).all() and (unit.gate_bias == 1).all() and (unit.gate_weight[0] == 0).all()
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = unit.direction
    assert not torch.equal(model(ids).logits, base)
    assert all(not torch.allclose(z[i], z[j]) for i in range(3) for j in range(i))
