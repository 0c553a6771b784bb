"""Random models of a few thousand parameters, one for each layout, and a word-level chat tokenizer. No Hub."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_psr import PSRConfig
from peft_psr.caches import cache_name


VOCABULARY = 64
LAYERS = 4
WIDTH = 32


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=1,
        )
    )


def tiny_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            n_positions=128,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def tiny_gemma():
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=1,
        )
    )


LAYOUTS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma": tiny_gemma}


def tiny_model(layout: str = "llama", seed: int = 0):
    """A model in eval mode whose random weights are large enough for edits to show in its logits."""
    torch.manual_seed(seed)
    model = LAYOUTS[layout]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def cache_argument(model, cache):
    """`cache` as an argument of the model, by the name that this version of transformers has for it."""
    return {cache_name(getattr(model, "get_base_model", lambda: model)().forward): cache}


CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ ' <' + m['role'] + '> ' + m['content'] + ' </t>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant> ' }}{% endif %}"
)


def steered_model(**settings):
    """The tiny model with an adapter whose gates are open and whose directions are random."""
    model = get_peft_model(tiny_model(), PSRConfig(**settings)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in model.psr_layers().values():
            layer.unit("default").direction.normal_(std=0.5)
    return model


def tiny_tokenizer(words: str = "be brief now what is tea dogs are good yes no a b c d e") -> PreTrainedTokenizerFast:
    """Whitespace words; `<s>` opens a conversation, `</t>` closes a turn."""
    special = ["<pad>", "<s>", "</t>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words.split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</t>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": special[4:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast
