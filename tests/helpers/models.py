"""Random models of a few thousand parameters, and how tests call them. No Hub."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_psr.base_model.caches import cache_name


VOCABULARY = 64
LAYERS = 4
WIDTH = 32
PROMPTS = [[1, 9, 12, 17, 23, 31], [1, 40, 8], [1, 22, 35, 19, 7]]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


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


def byte_model(seed=0):
    """A model for `tokenizers.byte_tokenizer`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=2, eos_token_id=1, bos_token_id=0, max_position_embeddings=512,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def script(monkeypatch, model, ids):
    """Let the model say these tokens, whatever it is asked."""
    forward, lengths = model.forward, []

    def scripted(input_ids=None, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        lengths.append(input_ids.shape[1])
        output.logits = torch.full_like(output.logits, -50.0)
        output.logits[:, -1, ids[min(len(lengths) - 1, len(ids) - 1)]] = 50.0
        return output

    monkeypatch.setattr(model, "forward", scripted)


def pad(rows, side):
    """Rows of unequal length as (ids, attention mask), padded on this side."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [0] * (width - len(row))
        ids.append(fill + row if side == "left" else row + fill)
        mask.append(fill + [1] * len(row) if side == "left" else [1] * len(row) + fill)
    return torch.tensor(ids), torch.tensor(mask)


IDS, ATTENTION = pad(PROMPTS, "left")


def logits(model, **more):
    """Of `PROMPTS`, padded on the left."""
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=ATTENTION, **more).logits


def generate(model, ids=IDS, attention_mask=ATTENTION, **more):
    """Greedy, `PROMPTS` unless other ids are given."""
    return model.generate(input_ids=ids, attention_mask=attention_mask, **{**GREEDY, **more})
