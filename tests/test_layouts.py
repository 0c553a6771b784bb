"""Every layout against five checks, each a test of its own; `scripts/tabulate_layouts.py` makes a table of them.

A layout is a tiny random model built from its configuration: decoders found by structure, encoder-decoders edited on
the decoder's side, and models edited where `target_modules` says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from reference import naive_edit
from tiny_models import tiny_tokenizer
from torch import nn

from peft_psr import PSRConfig
from peft_psr.decoder import decoder_layer_names
from peft_psr.training import PSRTrainer, PSRTrainingArguments


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
        )  # fmt: skip
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
        torch.manual_seed(1)
        with torch.no_grad():
            for layer in model.psr_layers().values():
                unit = layer.psr_unit["default"]
                unit.gate_weight.normal_()
                unit.direction.normal_()
        return model

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
