"""Every layout that is edited, as a tiny random model built from its configuration.

Decoders found by structure, encoder-decoders edited on the decoder's side, and models edited where `target_modules`
says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from helpers.adapters import randomize
from peft_psr import PSRConfig


COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BART_LIKE = {**COMMON, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
             "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip


def gemma3_multimodal():
    text = {**GROUPED, "head_dim": 8, "vocab_size": 80, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2
            + ["full_attention"]}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=70,
                             boi_token_index=71, eoi_token_index=72)  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(config)


def t5():
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            **COMMON,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


class Perceptron(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 64)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return tf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=8)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8)),
    "gemma3 multimodal": gemma3_multimodal,
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, intermediate_size=48)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8)),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(**COMMON, hidden_size=32, state_size=4, num_hidden_layers=3, expand=2)
    ),
}
ENCODER_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "t5": t5,
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART_LIKE)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**BART_LIKE)),
}
PROMPTS = torch.tensor([[0, 0, 1, 9, 12, 17], [1, 40, 8, 22, 35, 19]])
ATTENTION = (PROMPTS != 0).long()
DECODER_IDS = torch.tensor([[2, 11, 30, 7], [2, 25, 6, 44]])
LAST = [[0, 0, 0, 0, 0, 1]] * 2


@dataclass
class Case:
    """A layout and how it is edited and called.

    Attributes:
        build: Makes the model.
        settings: For `PSRConfig`.
        edited: Names of the modules that the settings mean.
        inputs: For the model's forward.
        mask: The tokens that a plain call edits, one list a row.
        labels: What the gradient check is to predict.
    """

    build: Callable[[], nn.Module]
    settings: dict[str, Any]
    edited: list[str]
    inputs: dict[str, torch.Tensor]
    mask: list[list[int]]
    labels: torch.Tensor
    compared: list[slice] = field(default_factory=lambda: [slice(2, None), slice(None)])

    def base(self):
        torch.manual_seed(0)
        # frozen, as PEFT leaves it: a matrix product's last bit may hang on whether its weight asks for a gradient
        return self.build().eval().requires_grad_(False)

    def steered(self, base):
        """The model with an adapter whose gates are partly open and whose edit is plain to see."""
        model = get_peft_model(base, PSRConfig(r=2, **self.settings)).eval()
        return randomize(model, ".gate_weight", ".direction")

    def logits(self, model, **more):
        with torch.no_grad():
            return model(**self.inputs, **more).logits


def decoder_case(build, layers):
    names = [f"{name}.{i}" for name, i in layers]
    prompt = {"input_ids": PROMPTS, "attention_mask": ATTENTION}
    return Case(build, {"layers_to_transform": [0, 2]}, names, prompt, LAST, PROMPTS)


WHERE = {"gpt2": "transformer.h", "falcon": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt":
         "model.decoder.layers", "gemma3 multimodal": "model.language_model.layers",
         "mamba": "backbone.layers"}  # fmt: skip
CASES = {
    name: decoder_case(build, [(WHERE.get(name, "model.layers"), i) for i in (0, 2)])
    for name, build in DECODERS.items()
}
CASES |= {
    name: Case(
        build,
        {"layers_to_transform": [0, 2], "task_type": "SEQ_2_SEQ_LM"},
        [f"{'decoder.block' if name == 't5' else 'model.decoder.layers'}.{i}" for i in (0, 2)],
        {"input_ids": PROMPTS, "attention_mask": ATTENTION, "decoder_input_ids": DECODER_IDS},
        [[1] * 4] * 2,
        DECODER_IDS,
        [slice(None)] * 2,
    )
    for name, build in ENCODER_DECODERS.items()
}
CASES["llama, attention blocks"] = Case(
    DECODERS["llama"],
    {"target_modules": ["self_attn"], "task_type": "CAUSAL_LM"},
    [f"model.layers.{i}.self_attn" for i in range(3)],
    {"input_ids": PROMPTS, "attention_mask": ATTENTION},
    LAST,
    PROMPTS,
)
CASES["llama, linear layers"] = Case(
    DECODERS["llama"],
    {"target_modules": r".*layers\.[02]\.mlp\.down_proj", "task_type": "CAUSAL_LM"},
    [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)],
    {"input_ids": PROMPTS, "attention_mask": ATTENTION},
    LAST,
    PROMPTS,
)
CASES["plain nn.Module"] = Case(
    Perceptron,
    {"target_modules": ["first", "second"]},
    ["first", "second"],
    {"x": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))},
    [[1] * 5] * 2,
    torch.tensor([[1, 2, 3, 4, 5]] * 2),
    [slice(None)] * 2,
)
