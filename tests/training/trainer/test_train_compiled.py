"""Training with compiled decoder layers is training as ever.

The backend is "eager" (Dynamo traces, guards and recompiles as ever, the graphs run as they are), which is quick.
"""

from __future__ import annotations

import pytest
import torch
from helpers.models import LAYOUTS, tiny_model
from helpers.runs import fresh_trainer, trained
from helpers.triplets import triplets
from torch._dynamo.utils import counters
from transformers import TrainerCallback


COMPILED = {"torch_compile_backend": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    "layout, layers, settings",
    [
        *((layout, None, {}) for layout in LAYOUTS),
        ("llama", None, {"gradient_checkpointing": True, "teacher_cache": "none"}),
        ("llama", 2, {"objective": "kl"}),  # the layers below are not computed
        ("llama", 2, {"bf16": True, "teacher_cache": "none"}),
    ],
)
def test_the_adapter_is_the_same(tmp_path, layout, layers, settings):
    plain, _ = trained(tiny_model(layout), tmp_path, layers, **settings)
    assert not counters["stats"]
    compiled, _ = trained(tiny_model(layout), tmp_path, layers, **settings, **COMPILED)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2 if "bf16" in settings else 1e-5, rtol=1e-2)
    assert counters["stats"]["unique_graphs"] > 0


def test_a_few_graphs_serve_all_layers_steps_and_lengths(tmp_path):
    class Count(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

    graphs = []
    made = fresh_trainer(tiny_model(), tmp_path, teacher_cache="none", **COMPILED)
    made.add_callback(Count())
    made.train()
    assert len(graphs) == 3 and graphs[0] == graphs[2]
    assert graphs[0] <= 6  # with gradients and without, with padding and without, one row and more
    assert not counters["graph_break"]


def test_no_graph_is_refused(tmp_path, caplog):
    held_out = triplets("dogs are good")
    settings = {"teacher_cache": "none", "eval_strategy": "epoch", "per_device_train_batch_size": 5, **COMPILED}
    for layout in ("llama", "gemma"):  # which share the code that is compiled
        base = tiny_model(layout)
        # a last batch of one row, with padding and without, with and without gradients
        fresh_trainer(base, tmp_path, None, held_out[:3], per_device_eval_batch_size=2, **settings).train()
    assert "recompile_limit" not in caplog.text


def test_the_layers_are_as_before_when_training_ends_or_fails(tmp_path):
    made = fresh_trainer(tiny_model(), tmp_path, learning_rate=1e30, max_grad_norm=0.0, **COMPILED)
    with pytest.raises(FloatingPointError):
        made.train()
    layers = made.model.get_base_model().model.layers
    assert not any("forward" in vars(layer) for layer in layers)


def test_an_offloaded_layer_is_refused(tmp_path):
    made = fresh_trainer(tiny_model(), tmp_path, **COMPILED)
    layers = made.model.get_base_model().model.layers
    layers[1].forward = layers[1].forward
    with pytest.raises(ValueError, match=r"can't compile 'model.layers.1'"):
        made.train()
    assert "forward" not in vars(layers[0])
