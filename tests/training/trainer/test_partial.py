"""Parts of a model against the whole of it, in every decoder layout."""

from __future__ import annotations

import pytest
import torch
from helpers.layouts import CASES, DECODERS

from peft_psr.base_model.decoder import capture_layer_outputs, decoder_layer_names
from peft_psr.hooks import attach_state
from peft_psr.training.passes.partial import known_output, predict, stop_after


layouts = pytest.mark.parametrize("layout", DECODERS)


def whole(layout):
    """A steered model, the names of its layers, what they return in a plain call, and the logits."""
    case = CASES[layout]
    model = case.steered(case.base())
    base = model.get_base_model()
    names = decoder_layer_names(base)
    with capture_layer_outputs(base, names) as outputs, torch.no_grad():
        logits = model(**case.inputs, use_cache=False).logits
    return case, model, base, names, dict(outputs), logits


@layouts
def test_the_head_alone_gives_the_models_logits(layout):
    case, model, base, names, outputs, logits = whole(layout)
    hidden = outputs[names[-1]].requires_grad_()
    got = predict(base, hidden.flatten(0, 1)).view_as(logits)
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)
    got[:, -1].logsumexp(-1).sum().backward()
    assert hidden.grad[:, -1].any() and not hidden.grad[:, :-1].any()


@layouts
def test_going_on_from_a_known_output_equals_the_whole_call(layout):
    case, model, base, names, outputs, logits = whole(layout)
    predict(base, outputs[names[-1]][0])  # by now it is known what each layer returns
    for last in range(len(names)):
        computed = []
        handles = [
            child.register_forward_hook(lambda *_, name=name, computed=computed: computed.append(name))
            for name in names
            for key, child in list(base.get_submodule(name).named_children())[:1]
        ]
        with known_output(base, names[: last + 1], outputs[names[last]], edited=True), torch.no_grad():
            got = model(**case.inputs, use_cache=False).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)
        assert set(computed) == set(names[last + 1 :])
    assert torch.equal(case.logits(model), case.logits(model))


@layouts
def test_a_known_output_without_its_edit_is_edited(layout):
    case, model, base, names, outputs, logits = whole(layout)
    first = case.edited[0]
    with model.disable_adapter(), capture_layer_outputs(base, [first]) as plain, torch.no_grad():
        model(**case.inputs, use_cache=False)
    with known_output(base, [first], plain[first], edited=False), torch.no_grad():
        got = model(**case.inputs, use_cache=False).logits
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)
    with known_output(base, [first], plain[first], edited=True), torch.no_grad():
        unedited = model(**case.inputs, use_cache=False).logits
    assert not torch.allclose(unedited, logits, atol=1e-3)


@layouts
def test_layers_after_a_stop_do_nothing(layout):
    case, model, base, names, outputs, logits = whole(layout)
    with stop_after(base, names[2:]), capture_layer_outputs(base, names) as seen, torch.no_grad():
        model(**case.inputs, use_cache=False)
    assert torch.equal(seen[names[1]], outputs[names[1]])
    assert all(torch.equal(seen[name], outputs[names[1]]) for name in names[2:])


def test_partial_calls_leave_the_steering_state_and_the_layers_as_they_were():
    case, model, base, names, outputs, logits = whole("llama")
    state = attach_state(base)
    model(**case.inputs, steering_mask=case.inputs["attention_mask"], use_cache=False)
    before = dict(vars(state))
    predict(base, outputs[names[-1]][0])
    assert vars(state) == before
    with pytest.raises(RuntimeError, match="stop"), known_output(base, names, outputs[names[-1]], edited=True):
        raise RuntimeError("stop")
    assert not any("forward" in vars(base.get_submodule(name)) for name in names)
    assert not any(layer._disable_adapters for layer in model.psr_layers().values())
    torch.testing.assert_close(case.logits(model), logits)
