"""Every decoder layout: found by structure, edited as plain hooks do, generated, saved, reloaded, unloaded."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from peft_psr import PSRConfig
from peft_psr.decoder import decoder_layer_names


COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def gemma3_multimodal():
    text = {**GROUPED, "head_dim": 8, "vocab_size": 80, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2
            + ["full_attention"]}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=70,
                             boi_token_index=71, eoi_token_index=72)  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(config)


LAYOUTS = {
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
}
PROMPTS = torch.tensor([[0, 0, 1, 9, 12, 17], [1, 40, 8, 22, 35, 19]])
ATTENTION = (PROMPTS != 0).long()


def build(layout):
    torch.manual_seed(0)
    return LAYOUTS[layout]().eval()


def steered(model, **settings):
    model = get_peft_model(model, PSRConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.psr_layers().values():
            layer.psr_unit["default"].gate_weight.normal_()
            layer.psr_unit["default"].direction.normal_()
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tmp_path):
    base = build(layout)
    names = decoder_layer_names(base)
    assert len(names) == 3 and "vision" not in names[0]
    keys = list(base.state_dict())
    plain = base(input_ids=PROMPTS, attention_mask=ATTENTION).logits
    model = steered(copy.deepcopy(base), layers_to_transform=[0, 2], r=2)

    # the edit is what plain hooks with the same formula do
    def hook(module, args, output, unit):
        hidden = output[0] if isinstance(output, tuple) else output
        gates = torch.relu(hidden[:, -1:] @ unit.gate_weight.T + unit.gate_bias)
        edited = torch.cat([hidden[:, :-1], hidden[:, -1:] + gates @ unit.direction], dim=1)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handles = []
    for index, layer in model.psr_layers().items():
        unit = layer.psr_unit["default"]
        target = base.get_submodule(names[index])
        handles.append(target.register_forward_hook(lambda m, a, o, unit=unit: hook(m, a, o, unit)))
    expected = base(input_ids=PROMPTS, attention_mask=ATTENTION).logits
    for handle in handles:
        handle.remove()
    logits = model(input_ids=PROMPTS, attention_mask=ATTENTION).logits
    torch.testing.assert_close(logits[1], expected[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[0, 2:], expected[0, 2:], atol=1e-5, rtol=1e-4)
    assert not torch.equal(logits[:, -1], plain[:, -1])
    # close, not equal: a mixture of experts computes a token together with whatever else its expert got
    torch.testing.assert_close(logits[1, :-1], plain[1, :-1], atol=1e-6, rtol=1e-5)

    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=PROMPTS, attention_mask=ATTENTION, **settings)
    uncached = model.generate(input_ids=PROMPTS, attention_mask=ATTENTION, use_cache=False, **settings)
    assert torch.equal(cached, uncached)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(reloaded(input_ids=PROMPTS, attention_mask=ATTENTION).logits, logits)

    restored = model.unload()
    assert list(restored.state_dict()) == keys
    assert torch.equal(restored(input_ids=PROMPTS, attention_mask=ATTENTION).logits, plain)
