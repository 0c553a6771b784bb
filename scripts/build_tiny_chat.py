"""Builds the embedded chat model from nothing but its grammar: tokenizer, training, measurement, model folder.

Run `python scripts/build_tiny_chat.py`; about 8 minutes on two CPU cores. Every batch is freshly drawn from the
grammar. The new folder replaces the old one only if the model reaches every figure in `REQUIRED`; otherwise the
figures are printed, nothing is written, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_psr.prompts.messages import Message
from peft_psr.tiny_chat import TRAITS, instructions, prompt_messages, questions, sample_conversation, tiny_chat_path
from peft_psr.tiny_chat.grammar import all_texts
from peft_psr.tiny_chat.topics import split_tokens
from peft_psr.training.judges.grammar import GrammarJudge


PAD, UNKNOWN, BOS, END = "<|pad|>", "<|unk|>", "<|bos|>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
MARKS = ".,!?:"
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('Unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|> ' + message['content'] + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

STEPS = 1000
TOKENS_PER_STEP = 4096
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
MAX_POSITIONS = 256
MAX_NEW_TOKENS = 128

REQUIRED = {
    "validation_loss": ("<=", 0.55),
    "prompted_trait_mean": (">=", 95.0),
    "prompted_trait_worst": (">=", 90.0),
    "unprompted_trait_worst": ("<=", 3.0),
    "prompted_coherence_worst": (">=", 90.0),
    "unprompted_coherence": (">=", 92.0),
    "folder_megabytes": ("<=", 6.0),
}
"""What the model must reach: loss in nats per assistant token; scores at temperature 1 on held-out instructions and
held-out questions, "worst" over the traits. The grammar's own entropy, which no model can beat, is about 0.46."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of all words of the grammar, whose decoded text is exactly the text encoded."""
    words = sorted({token for text in all_texts() for token in split_tokens(text)} | set(MARKS))
    tokens = [PAD, UNKNOWN, BOS, END, *ROLES.values(), *(word if word in MARKS else f"▁{word}" for word in words)]
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    # A text that starts with a word gets the blank that words have elsewhere; the decoder takes it off again.
    backend.normalizer = normalizers.Replace(Regex(rf"\A(?=[^\s{MARKS}])"), " ")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Split(Regex(f"[{MARKS}]"), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(conversation: Sequence[Message], vocabulary: dict[str, int]) -> tuple[list[int], list[bool]]:
    """Token ids as the chat template gives them (only faster), and which of them the assistant is to produce."""
    ids, targets = [vocabulary[BOS]], [False]
    for message in conversation:
        words = split_tokens(message["content"])
        turn = [vocabulary[word if word in MARKS else f"▁{word}"] for word in words] + [vocabulary[END]]
        ids += [vocabulary[ROLES[message["role"]]], *turn]
        targets += [False, *[message["role"] == "assistant"] * len(turn)]
    return ids, targets


def draw_batches(seed: int, vocabulary: dict[str, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless fresh batches of like-long conversations: ids and labels (-100: no loss), each (batch, seq)."""
    rng = random.Random(seed)
    while True:
        pool = [encode(sample_conversation(rng), vocabulary) for _ in range(4096)]
        pool.sort(key=lambda pair: len(pair[0]))
        batches = [[pool[0]]]
        for pair in pool[1:]:
            if (len(batches[-1]) + 1) * len(pair[0]) > TOKENS_PER_STEP:
                batches.append([])
            batches[-1].append(pair)
        rng.shuffle(batches)
        for batch in batches:
            yield collate(batch, vocabulary[PAD])


def collate(batch: Sequence[tuple[list[int], list[bool]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels, each (batch, seq)."""
    length = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), -100)
    for row, (row_ids, targets) in enumerate(batch):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_ids)] = ids[row, : len(row_ids)].where(torch.tensor(targets), torch.tensor(-100))
    return ids, labels


def assistant_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the assistant's tokens. Right padding needs no mask under causal attention."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state  # (batch, seq - 1, d)
    wanted = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def train(model: LlamaForCausalLM, vocabulary: dict[str, int], steps: int, seed: int) -> None:
    """Train the model with AdamW, a linear warm-up and a cosine decay to a hundredth of the peak rate."""
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)

    def rate(step: int) -> float:
        progress = min(1.0, step / steps)
        return min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = draw_batches(seed, vocabulary)
    bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    model.train()
    started, seen, smooth = time.monotonic(), 0, math.log(len(vocabulary))
    for step in range(1, steps + 1):
        ids, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = assistant_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen += ids.numel()
        smooth += 0.05 * (loss.item() - smooth)
        if step % 100 == 0 or step == steps:
            elapsed = time.monotonic() - started
            speed = f"{seen / elapsed:,.0f} tokens/s  {elapsed:.0f} s"
            print(f"step {step}/{steps}  loss {smooth:.4f}  {speed}", flush=True)
    model.eval()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, vocabulary: dict[str, int], seed: int) -> float:
    """Loss in nats per assistant token on conversations drawn from a seed of their own."""
    batches = draw_batches(seed, vocabulary)
    weighted, tokens = 0.0, 0
    for _ in range(20):
        ids, labels = next(batches)
        count = int((labels[:, 1:] != -100).sum())
        weighted += assistant_loss(model, ids, labels).item() * count
        tokens += count
    return weighted / tokens


@torch.no_grad()
def complete(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]]
) -> list[str]:
    """One completion of each conversation, sampled at temperature 1."""
    prompts = tokenizer.apply_chat_template(
        list(conversations), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=MAX_NEW_TOKENS
    )
    return tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def wrong(judge: GrammarJudge, prompt: Sequence[Message], completion: str) -> Iterator[str]:
    """The name of each failure in a completion, as often as it occurs."""
    for failure, count in judge.explain(prompt, completion)["failures"].items():
        yield from [failure] * count


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Trait and coherence scores, prompted and not, on held-out instructions x held-out questions."""
    torch.manual_seed(seed)
    figures: dict[str, float] = {}
    texts = [question.text for question in questions("test")]
    bare = [prompt_messages(text) for text in texts] * 20
    plain = complete(model, tokenizer, bare)
    for trait in TRAITS:
        judge = GrammarJudge(trait)
        scores = judge(bare, plain)
        figures[f"unprompted_trait/{trait}"] = sum(score.trait for score in scores) / len(scores)
        figures["unprompted_coherence"] = sum(score.coherence for score in scores) / len(scores)
        pairs = [(text, instruction) for text in texts for instruction in instructions(trait, "test")] * 6
        completions = complete(model, tokenizer, [prompt_messages(*pair) for pair in pairs])
        asked = [prompt_messages(text) for text, _ in pairs]
        scores = judge(asked, completions)
        figures[f"prompted_trait/{trait}"] = sum(score.trait for score in scores) / len(scores)
        figures[f"prompted_coherence/{trait}"] = sum(score.coherence for score in scores) / len(scores)
        counts = Counter(failure for case in zip(asked, completions, strict=True) for failure in wrong(judge, *case))
        print(f"{trait}: failures in {len(asked)} prompted answers: {dict(counts)}", flush=True)
    prompted = [figures[f"prompted_trait/{trait}"] for trait in TRAITS]
    figures["prompted_trait_mean"] = sum(prompted) / len(prompted)
    figures["prompted_trait_worst"] = min(prompted)
    figures["unprompted_trait_worst"] = max(figures[f"unprompted_trait/{trait}"] for trait in TRAITS)
    figures["prompted_coherence_worst"] = min(figures[f"prompted_coherence/{trait}"] for trait in TRAITS)
    return figures


def missed(figures: dict[str, float]) -> list[str]:
    """The requirements that the figures miss, in words."""
    return [
        f"{name} is {figures[name]:.4g}, required {relation} {bound:.4g}"
        for name, (relation, bound) in REQUIRED.items()
        if not (figures[name] <= bound if relation == "<=" else figures[name] >= bound)
    ]


def put_in_place(new: Path, output: Path) -> None:
    """Rename a finished folder to `output`, replacing what is there."""
    old = new.with_name(new.name + ".old")
    if output.exists():
        output.rename(old)
    new.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    """Build, measure, and write if good enough; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train the embedded chat model from its grammar.")
    parser.add_argument("--output", type=Path, default=Path(tiny_chat_path()), help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the data and the samples")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of {TOKENS_PER_STEP} tokens")
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    vocabulary = tokenizer.get_vocab()
    train(model, vocabulary, args.steps, args.seed)
    figures = {"validation_loss": validation_loss(model, vocabulary, args.seed + 1_000_003)}
    figures |= measure(model, tokenizer, args.seed)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny_chat_", dir=args.output.parent) as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        figures["folder_megabytes"] = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        figures["minutes"] = (time.monotonic() - started) / 60
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))
        failures = missed(figures)
        if failures:
            print("Not written:", *failures, sep="\n  ", file=sys.stderr)
            return 1
        put_in_place(folder, args.output)
    print(f"Written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
