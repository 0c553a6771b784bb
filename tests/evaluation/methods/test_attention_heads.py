"""Attention's output projections, found by the structure of a decoder layer."""

from __future__ import annotations

import pytest
from helpers.models import LAYERS, tiny_model
from torch import nn

from peft_psr.evaluation.methods.fitting.attention_heads import output_projections


class Block(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@pytest.mark.parametrize(
    ("path", "others"),
    [
        ("self_attn.o_proj", ["mlp.down_proj", "post_attention_layernorm"]),  # Llama, Qwen, Gemma
        ("self_attn.out_proj", ["encoder_attn.out_proj", "fc2"]),  # OPT, BART
        ("attn.c_proj", ["crossattention.c_proj", "mlp.c_proj"]),  # GPT-2
        ("attn.attention.out_proj", ["mlp.c_proj"]),  # GPT-Neo
        ("self_attention.dense", ["mlp.dense_4h_to_h", "mlp.dense"]),  # Bloom, Falcon
        ("attention.output.dense", ["output.dense", "intermediate.dense"]),  # BERT's
        ("self_attn.dense", ["linear_attn.out_proj"]),  # Phi
        ("attention.wo", ["feed_forward.w2"]),  # InternLM2
    ],
)
def test_output_projections_by_structure(path, others):
    model = tiny_model()
    for number in range(LAYERS):
        block = Block()
        for name in [path, *others][:: 1 if number else -1]:
            *parents, last = name.split(".")
            inner = block
            for parent in parents:
                if not hasattr(inner, parent):
                    inner.add_module(parent, Block())
                inner = getattr(inner, parent)
            inner.add_module(last, nn.Linear(2, 2))
        model.model.layers[number] = block
    model.model.layers[1] = Block(mixer=Block(out_proj=nn.Linear(2, 2)))  # a layer without attention
    assert output_projections(model) == [f"model.layers.{number}.{path}" for number in (0, 2, 3)]
