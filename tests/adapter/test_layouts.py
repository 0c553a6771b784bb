"""Every layout against five checks, each a test of its own; `scripts/tabulate_layouts.py` makes a table of them.

A layout is a tiny random model built from its configuration: decoders found by structure, encoder-decoders edited on
the decoder's side, and models edited where `target_modules` says.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from helpers.layouts import ATTENTION, CASES, DECODER_IDS, DECODERS, ENCODER_DECODERS, PROMPTS, WHERE
from helpers.reference import naive_edit
from helpers.tokenizers import tiny_tokenizer
from peft import PeftModel

from peft_psr.base_model.decoder import decoder_layer_names
from peft_psr.training import PSRTrainer, PSRTrainingArguments


GENERATING = [name for name in CASES if name != "plain nn.Module"]
layouts = pytest.mark.parametrize("layout", CASES)


@contextmanager
def plainly_edited(base, model, mask):
    """Inside, `base` does what the adapter of `model` says, by plain hooks and the naive formula."""

    def hook(output, unit):
        hidden = output[0] if isinstance(output, tuple) else output
        weights = (unit.gate_weight, unit.gate_bias, unit.direction)
        edited = torch.stack([naive_edit(h, *weights, m, 1.0) for h, m in zip(hidden, mask, strict=True)])
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    units = {layer.name: layer.psr_unit["default"] for layer in model.psr_layers().values()}
    handles = [
        base.get_submodule(name).register_forward_hook(lambda m, a, o, unit=unit: hook(o, unit))
        for name, unit in units.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@layouts
def test_edit_equals_the_reference(layout):
    case = CASES[layout]
    base = case.base()
    plain = case.logits(base)
    model = case.steered(copy.deepcopy(base))
    assert [layer.name for layer in model.psr_layers().values()] == case.edited

    with plainly_edited(base, model, case.mask):
        expected = case.logits(base)
    got = case.logits(model)
    for row, mask in enumerate(case.mask):
        tokens = case.compared[row]
        torch.testing.assert_close(got[row, tokens], expected[row, tokens], atol=1e-5, rtol=1e-4)
        first = mask.index(1)
        assert not torch.equal(got[row, first:], plain[row, first:])
        # close, not equal: a mixture of experts computes a token together with whatever else its expert got
        before = slice(tokens.start, first)
        torch.testing.assert_close(got[row, before], plain[row, before], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", GENERATING)
def test_generation_with_cache_equals_without(layout):
    case = CASES[layout]
    model = case.steered(case.base())
    prompt = {"input_ids": PROMPTS, "attention_mask": ATTENTION}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
                "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    cached = model.generate(**prompt, use_cache=True, **settings)
    uncached = model.generate(**prompt, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    for step, (with_cache, without) in enumerate(zip(cached.scores, uncached.scores, strict=True)):
        torch.testing.assert_close(with_cache, without, atol=1e-3, rtol=1e-3, msg=lambda m, i=step: f"step {i}: {m}")
    with model.disable_adapter():
        plain = model.generate(**prompt, **settings)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(cached.scores, plain.scores, strict=True))


@layouts
def test_saved_and_reloaded_bit_for_bit(layout, tmp_path):
    case = CASES[layout]
    base = case.base()
    model = case.steered(copy.deepcopy(base))
    logits = case.logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(case.logits(reloaded), logits)
    assert not torch.equal(case.logits(base), logits)


@layouts
def test_unload_restores_bit_for_bit(layout):
    case = CASES[layout]
    base = case.base()
    plain, state = case.logits(base), copy.deepcopy(base.state_dict())
    model = case.steered(base)
    assert not torch.equal(case.logits(model), plain)
    restored = model.unload()
    assert restored is base and list(base.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(case.logits(base), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@layouts
def test_gradient_reaches_every_unit_and_nothing_else(layout):
    case = CASES[layout]
    model = case.steered(case.base())
    with torch.no_grad():
        for layer in model.psr_layers().values():
            layer.psr_unit["default"].gate_bias.fill_(20.0)
            layer.psr_unit["default"].direction.mul_(0.01)
    more = {} if layout == "plain nn.Module" else {"steering_mask": torch.ones_like(case.labels)}
    model(**case.inputs, **more, labels=case.labels).loss.backward()
    for name, parameter in model.named_parameters():
        if "psr_unit" in name:
            assert parameter.grad is not None and bool((parameter.grad != 0).all()), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("layout", DECODERS)
def test_decoder_layers_are_found_by_structure(layout):
    names = decoder_layer_names(CASES[layout].base())
    assert names == [f"{WHERE.get(layout, 'model.layers')}.{i}" for i in range(3)]


encoder_decoders = pytest.mark.parametrize("layout", ENCODER_DECODERS)


@encoder_decoders
def test_encoder_decoder_mask_counts_decoder_tokens(layout):
    case = CASES[layout]
    base = case.base()
    model = case.steered(copy.deepcopy(base))
    mask = [[0, 1, 0, 1], [1, 0, 0, 0]]
    with plainly_edited(base, model, mask):
        expected = case.logits(base)
    torch.testing.assert_close(case.logits(model, steering_mask=torch.tensor(mask)), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"\(2, 4\), got \(2, 6\)"):
        case.logits(model, steering_mask=torch.ones_like(PROMPTS))


@encoder_decoders
def test_encoder_decoder_generation_equals_the_reference(layout):
    case = CASES[layout]
    base = case.base()
    model = case.steered(copy.deepcopy(base))
    prompt = {"input_ids": PROMPTS, "attention_mask": ATTENTION}
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = torch.full((2, 1), base.config.decoder_start_token_id)
    for length in range(1, 6):
        with plainly_edited(base, model, [[1] * length] * 2), torch.no_grad():
            step = base(**prompt, decoder_input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, step], dim=1)
    assert torch.equal(tokens, expected)
    with pytest.raises(ValueError, match="encoder-decoder"):
        model.generate(**prompt, steering_mask=ATTENTION)


@encoder_decoders
def test_encoder_decoder_rows_and_beams_have_their_own_strength(layout):
    case = CASES[layout]
    model = case.steered(case.base())
    settings = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2, "do_sample": False,
                "eos_token_id": None}  # fmt: skip
    together = model.generate(input_ids=PROMPTS, attention_mask=ATTENTION, alpha=[0.5, 2.0], **settings)
    for row, alpha in enumerate([0.5, 2.0]):
        alone = model.generate(
            input_ids=PROMPTS[row : row + 1], attention_mask=ATTENTION[row : row + 1], alpha=alpha, **settings
        )
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


@encoder_decoders
def test_encoder_decoder_labels_and_the_decoder_by_itself_edit_every_token(layout):
    case = CASES[layout]
    model = case.steered(case.base())
    base = model.get_base_model()
    inputs = {"input_ids": PROMPTS, "attention_mask": ATTENTION}
    with torch.no_grad():
        by_labels = model(**inputs, labels=DECODER_IDS, output_hidden_states=True)
        shifted = base.prepare_decoder_input_ids_from_labels(labels=DECODER_IDS)
        by_ids = model(**inputs, decoder_input_ids=shifted)
        torch.testing.assert_close(by_labels.logits, by_ids.logits)
        alone = base.get_decoder()(
            input_ids=shifted,
            encoder_hidden_states=by_labels.encoder_last_hidden_state,
            encoder_attention_mask=ATTENTION,
        )
    torch.testing.assert_close(alone.last_hidden_state, by_labels.decoder_hidden_states[-1])


def test_trainer_refuses_encoder_decoders(tmp_path):
    model = CASES["t5"].steered(CASES["t5"].base())
    prompt = [{"role": "user", "content": "what is tea"}]
    triplet = {"prompt": prompt, "steered_prompt": [{"role": "system", "content": "be brief"}, *prompt],
               "completion": "tea is good", "trait_score": 90, "coherence_score": 90}  # fmt: skip
    with pytest.raises(ValueError, match="encoder-decoder"):
        PSRTrainer(model, PSRTrainingArguments(str(tmp_path)), [triplet], processing_class=tiny_tokenizer())
