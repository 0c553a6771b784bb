"""Tokenizers with chat templates, made in the test.

A word-level one, and a byte-level BPE that can spell any text, whole letters or not.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ ' <' + m['role'] + '> ' + m['content'] + ' </t>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant> ' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # Qwen3's ways: thinks unless told not to, and forgets the thoughts of earlier turns
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ (m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content']) + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PARTS = (  # a template that knows no other content than a list of parts
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template=CHATML, eos="<|im_end|>", extra=(), pad="<|endoftext|>"):
    """420 tokens or fewer: three special ones first (<|im_start|>, <|im_end|>, <|endoftext|>), then `extra`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>", *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["hello what is tea good yes no be formal answer"] * 50 + ["\n\n\n", "\n\n"] * 200
    tokenizer.train_from_iterator(words, trainer)
    special = {name: token for name, token in (("pad_token", pad), ("eos_token", eos)) if token}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


def tiny_tokenizer(words: str = "be brief now what is tea dogs are good yes no a b c d e") -> PreTrainedTokenizerFast:
    """Whitespace words; `<s>` opens a conversation, `</t>` closes a turn."""
    special = ["<pad>", "<s>", "</t>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</t>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": special[4:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast
