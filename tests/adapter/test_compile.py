"""`torch.compile` of a steered model: no graph break, the eager model's results, and settings that stay changeable.

The backend is "eager" (Dynamo traces, guards and recompiles as ever, the graph runs as it is), which is quick; one
test compiles with Inductor. Docstrings are lines of the table of modes in `docs/layouts.md`.
"""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from helpers.adapters import randomize, steered
from helpers.models import ATTENTION, GREEDY, IDS, PROMPTS, cache_argument, logits, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from peft_psr import PSRConfig


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"]
    torch._dynamo.reset()


def two_layers():
    """Llama cut to two layers: Dynamo's time goes with their number."""
    base = tiny_model()
    base.model.layers = base.model.layers[:2]
    base.config.num_hidden_layers = 2
    return base


@pytest.fixture
def model():
    model = steered(two_layers(), adapter_name="a", r=4)
    model.add_adapter("b", PSRConfig(layers_to_transform=1, gate="constant", r=2, positions="all"))
    randomize(model, "psr_unit.b.", seed=2)
    return model.eval()


@functools.cache
def plain_model_compiles():
    """Whether these versions of torch and transformers make one graph of a call without our adapters."""
    torch._dynamo.reset()
    try:
        torch.compile(two_layers(), backend="eager", fullgraph=True)(input_ids=IDS)
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        counters.clear()
    return True


@pytest.fixture
def one_graph():
    if not plain_model_compiles():
        pytest.skip("The model without adapters is more than one graph in these versions of torch and transformers.")


def graphs():
    return counters["stats"]["unique_graphs"]


def decode(model, kind, steps=6):
    """Logits (steps, batch, vocabulary) of a prompt and the greedy tokens after it, one call a step."""
    config = two_layers().config
    cache = StaticCache(config=config, max_cache_len=32) if kind == "static" else DynamicCache(config=config)
    tokens, out = torch.tensor(PROMPTS[:1]), []
    with torch.no_grad():
        for _ in range(steps):
            out.append(model(input_ids=tokens, **cache_argument(model, cache), use_cache=True).logits[:, -1])
            tokens = out[-1].argmax(-1, keepdim=True)
    return torch.stack(out)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_and_decode(model, cache):
    """`fullgraph=True`, prompt and cached steps: eager's logits, and no more graphs than the bare model takes."""
    base = two_layers()
    decode(torch.compile(base, fullgraph=True, backend="eager"), cache)
    bare = graphs()
    expected = decode(model, cache)
    torch._dynamo.reset()
    counters.clear()
    torch.testing.assert_close(decode(torch.compile(model, fullgraph=True, backend="eager"), cache), expected)
    assert graphs() == bare <= 3
    assert not torch.allclose(expected, decode(base, cache), atol=1e-2)


def test_generate_with_compiled_steps(model):
    """`generate` with a static cache and a `CompileConfig`: eager's tokens, one graph for all later steps."""
    settings = {"cache_implementation": "static", **GREEDY, "max_new_tokens": 12}
    mask = torch.zeros_like(IDS)
    mask[:, 3:] = 1
    for more in ({}, {"alpha": [0.5, 1.0, 2.0]}, {"steering_mask": mask}):
        torch._dynamo.reset()
        counters.clear()
        expected = model.generate(input_ids=IDS, attention_mask=ATTENTION, **settings, **more)
        compiling = CompileConfig(fullgraph=True, backend="eager")
        compiling._compile_all_devices = True
        compiled = model.generate(
            input_ids=IDS, attention_mask=ATTENTION, compile_config=compiling, **settings, **more
        )
        assert torch.equal(compiled, expected)
        assert 1 <= graphs() <= 2


def test_strength_set_after_compiling(model, one_graph):
    """`set_alpha` after compiling takes effect; twelve strengths in a row cost one more graph, not twelve."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = [logits(compiled)]
    for alpha in (0.1, 0.2, 0.3, 0.5, 0.7, 0.0, 2.0, 3.0, -1.0, 5.0, 1.5, 4.0):
        model.set_alpha(alpha, "a")
        seen.append(logits(compiled))
        torch.testing.assert_close(seen[-1], logits(model))
        assert all(not torch.equal(seen[-1], other) for other in seen[:-1])
    assert graphs() <= 3


def test_strength_of_a_call(model, one_graph):
    """`alpha=` of a compiled call, a number or one a row: any values, without a graph for each."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for alpha in (0.5, 2.0, -1.0, 0.25, 3.0):
        torch.testing.assert_close(logits(compiled, alpha=alpha), logits(model, alpha=alpha))
    numbers = graphs()
    for rows in ([0.5, 1.0, 2.0], [3.0, 0.0, 1.0], [0.1, 0.2, 0.3]):
        alpha = torch.tensor(rows)
        torch.testing.assert_close(logits(compiled, alpha=alpha), logits(model, alpha=alpha))
    assert numbers <= 2 and graphs() == numbers + 1


def test_steering_mask(model, one_graph):
    """`steering_mask=` of a compiled call: eager's logits for any mask, with one graph."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        mask = torch.randint(0, 2, IDS.shape, generator=generator)
        torch.testing.assert_close(logits(compiled, steering_mask=mask), logits(model, steering_mask=mask))
    assert graphs() == 1


def test_adapters_chosen_after_compiling(model, one_graph):
    """`set_adapter`, several active adapters, `disable_adapter`, `alpha_scale` after compiling: each takes effect."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = []

    def check():
        seen.append(logits(compiled))
        torch.testing.assert_close(seen[-1], logits(model))
        assert all(not torch.equal(seen[-1], other) for other in seen[:-1])

    check()
    model.set_adapter("b")
    check()
    model.base_model.set_adapter(["a", "b"])
    check()
    with model.disable_adapter():
        check()
    with model.alpha_scale(0.5):
        check()
    assert torch.equal(logits(compiled), seen[2])


def test_adapters_by_row(model, one_graph):
    """`adapter_names=` of a compiled call: each row by its own adapter, chosen anew with each call."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for names in (["a", "b", "__base__"], ["b", "b", "a"], ["__base__", "a", "b"]):
        torch.testing.assert_close(logits(compiled, adapter_names=names), logits(model, adapter_names=names))


def test_training_step(model, one_graph):
    """A compiled training step (AOTAutograd): the gradients of the eager one."""

    def gradients(callable_model):
        model.zero_grad()
        callable_model(input_ids=IDS, attention_mask=ATTENTION, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(model)
    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor(model, one_graph):
    """Inductor: eager's logits within float tolerance, and again after `set_alpha`."""
    compiled = torch.compile(model, fullgraph=True)
    for alpha in (1.0, 0.3):
        model.set_alpha(alpha, "a")
        torch.testing.assert_close(logits(compiled), logits(model), atol=1e-4, rtol=1e-4)
