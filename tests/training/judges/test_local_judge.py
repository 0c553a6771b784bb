"""The judge that runs here: the exact distribution over the numbers, and what follows them."""

from __future__ import annotations

import functools
import re
import types

import pytest
import torch
from helpers.models import LAYOUTS, tiny_model
from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from peft_psr.prompts.conversations import encode_prompt
from peft_psr.training.judges.answer_cache import AnswerCache
from peft_psr.training.judges.local import LocalJudge
from peft_psr.training.judges.number_scores import number_tokens


TRAIT, COHERENCE = "trait {question} | {answer}", "coherence {question} | {answer}"
QUESTION = [{"role": "user", "content": "what is tea"}]


def digit_tokenizer():
    """One token a digit, as Qwen, Gemma and Llama 2 have them."""
    special = ["<pad>", "<s>", "</t>", "<unk>", "<system>", "<user>", "<assistant>"]
    words = [*special, *"0123456789", *"trait coherence what is tea the answer | good dogs".split()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex("[0-9]"), "isolated")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</t>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": special[4:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


ANSWERS = ["tea is good", "what", "the answer is the answer dogs dogs dogs", "dogs"]


def local(model, tokenizer, **settings):
    return LocalJudge(model, tokenizer, trait_prompt=TRAIT, coherence_prompt=COHERENCE, **settings)


def question(template, text):
    return [{"role": "user", "content": template.format(question="what is tea", answer=text)}]


@functools.cache
def next_probabilities(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].softmax(-1)


@torch.no_grad()
def naive_number_probability(model, prompt_ids, digits, number):
    """Of one number, with one forward pass of all that came before for each token."""
    probability, ids = 1.0, tuple(prompt_ids)
    for digit in str(number):
        probability *= next_probabilities(model, ids)[digits[digit]].item()
        ids += (digits[digit],)
    if 1 <= number <= 9:
        probability *= 1 - next_probabilities(model, ids)[sorted(digits.values())].sum().item()
    if number == 10:
        probability *= 1 - next_probabilities(model, ids)[digits["0"]].item()
    return probability


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_numbers_are_scored_exactly(layout, monkeypatch):
    model, tokenizer = tiny_model(layout), digit_tokenizer()
    digits = {digit: tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    assert number_tokens(tokenizer)[85] == (digits["8"], digits["5"])
    judge = local(model, tokenizer, batch_size=7)  # a padded batch, and one more
    monkeypatch.setattr("peft_psr.training.judges.answer_score.MIN_MASS", 0.0)  # a random model answers anything
    monkeypatch.setattr("peft_psr.training.judges.number_scores.score_text", lambda text, cut_off: 50.0)
    for score, text in zip(judge([QUESTION] * 4, ANSWERS), ANSWERS, strict=True):
        ids = encode_prompt(tokenizer, question(TRAIT, text))
        masses = {n: naive_number_probability(model, ids, digits, n) for n in range(101)}
        assert score.trait == pytest.approx(sum(n * p for n, p in masses.items()) / sum(masses.values()), rel=1e-4)


def test_mass_of_split_numbers_decides():
    model, tokenizer = tiny_model(), digit_tokenizer()
    digits = {digit: tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    ids = encode_prompt(tokenizer, question(TRAIT, "dogs"))
    mass = sum(naive_number_probability(model, ids, digits, n) for n in range(101))
    scores = local(model, tokenizer)([QUESTION], ["dogs"])
    assert (scores[0].trait is None) == (mass < 0.25)


class Says:
    """A model that says one text after every prompt, whatever its numbers."""

    def __init__(self, tokenizer, text, prompt_end):
        self.ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        self.prompt_end, self.vocabulary = prompt_end, len(tokenizer)
        self.device, self.training = torch.device("cpu"), False
        self.config = types.SimpleNamespace(name_or_path="says")
        self.generation_config = types.SimpleNamespace(eos_token_id=tokenizer.eos_token_id)

    def named_parameters(self):
        return []

    def eval(self):
        return self

    def train(self, mode):
        return self

    def forward(self, input_ids, attention_mask, past_key_values, use_cache):
        seen = [] if past_key_values is None else past_key_values
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for i, row in enumerate(input_ids.tolist()):
            for j in range(len(row)):
                said = [*seen[i], *row[: j + 1]] if seen else row[: j + 1]
                if self.prompt_end in said:
                    spoken = said[::-1].index(self.prompt_end)
                    logits[i, j, self.ids[min(spoken, len(self.ids) - 1)]] = 20.0
        cache = [[*(seen[i] if seen else []), *row] for i, row in enumerate(input_ids.tolist())]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    __call__ = forward


def without_blanks_in_numbers(text):
    return re.sub(r"(?<=\d) (?=\d)", "", text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("8 5", 85),
        ("8 5 / 1 0 0", 85),
        ("8 / 1 0", None),
        ("1 . the answer", None),
        ("3 dogs", None),
        ("7 0 - 8 0", None),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_follows_a_number_decides_here_too(text, score, whole):
    words = "trait coherence what is tea the answer | dogs / . - " + " ".join(map(str, range(101)))
    tokenizer = tiny_tokenizer(words) if whole else digit_tokenizer()
    tokenizer.add_tokens(["/", ".", "-"])
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **settings: without_blanks_in_numbers(decode(ids, **settings)).replace(" .", ".")
    model = Says(
        tokenizer,
        without_blanks_in_numbers(text) if whole else text,
        tokenizer.convert_tokens_to_ids("<assistant>"),
    )
    (scores,) = local(model, tokenizer)([QUESTION], ["dogs"])
    assert scores.trait == (None if score is None else pytest.approx(score, abs=0.01))


@torch.no_grad()
def test_whole_numbers_are_scored_as_from_a_server(monkeypatch):
    monkeypatch.setattr("peft_psr.training.judges.answer_score.MIN_MASS", 0.0)
    monkeypatch.setattr("peft_psr.training.judges.number_scores.score_text", lambda text, cut_off: 50.0)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("trait coherence what is tea the answer | good dogs " + " ".join(map(str, range(101))))
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    judge = local(model, tokenizer, batch_size=2)
    assert judge.describe()["numbers"] == "single tokens"
    for score, text in zip(judge([QUESTION] * 4, ANSWERS), ANSWERS, strict=True):
        ids = encode_prompt(tokenizer, question(TRAIT, text))
        likeliest = next_probabilities(model, tuple(ids)).topk(20)
        words = tokenizer.convert_ids_to_tokens(likeliest.indices.tolist())
        masses = {int(w): p for w, p in zip(words, likeliest.values.tolist(), strict=True) if w.isdigit()}
        assert len(masses) > 5
        assert score.trait == pytest.approx(sum(n * p for n, p in masses.items()) / sum(masses.values()), rel=1e-4)


def test_local_answers_are_cached_by_the_weights(tmp_path):
    tokenizer, path = digit_tokenizer(), tmp_path / "answers"
    first = local(tiny_model(), tokenizer, cache=AnswerCache(path))
    scores = first([QUESTION] * 4, ANSWERS)
    assert first.usage["calls"] == 8 and first.usage["prompt_tokens"] > 50
    again = local(tiny_model(), tokenizer, cache=AnswerCache(path))
    assert again([QUESTION] * 4, ANSWERS) == scores and again.usage == {"cached": 8}
    other = local(tiny_model(seed=1), tokenizer, cache=AnswerCache(path))
    other([QUESTION] * 4, ANSWERS)
    assert other.usage["calls"] == 8


def test_blank_of_the_template_goes_with_the_number():
    tokenizer = digit_tokenizer()
    plain = number_tokens(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex("[0-9 ]"), "isolated")
    tokenizer.add_tokens([" "])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant> '", "<assistant>'")
    blank = tokenizer.convert_tokens_to_ids(" ")
    assert number_tokens(tokenizer) == {number: (blank, *tokens) for number, tokens in plain.items()}


def test_tokenizer_without_numbers():
    with pytest.raises(ValueError, match="no tokens for the numbers"):
        local(tiny_model(), tiny_tokenizer())
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        local(tiny_model(), digit_tokenizer(), batch_size=0)
