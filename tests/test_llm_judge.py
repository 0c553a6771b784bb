"""LLM judges: the score from log-probabilities, digits in tokens of their own, text only, the cache."""

from __future__ import annotations

import functools
import json
import re
import types

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, LAYOUTS, tiny_model, tiny_tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from unruly_server import MODEL, UnrulyServer, at_random

from peft_psr.chat import encode_prompt
from peft_psr.judging import JudgeScores
from peft_psr.training.answer_cache import AnswerCache
from peft_psr.training.llm_judge import ServerJudge, fill_prompt, question_text
from peft_psr.training.local_judge import LocalJudge, number_tokens
from peft_psr.training.server import ChatServer, ServerError


TRAIT, COHERENCE = "trait {question} | {answer}", "coherence {question} | {answer}"
QUESTION = [{"role": "user", "content": "what is tea"}]


# ---------------------------------------------------------------- prompts


def test_prompts_are_filled_once():
    assert fill_prompt("{question} {answer} {other} {}", question="{answer}", answer="b") == "{answer} b {other} {}"
    assert question_text("once") == "once" and question_text(QUESTION) == "what is tea"
    turns = [*QUESTION, {"role": "assistant", "content": "a drink"}, {"role": "user", "content": "hot?"}]
    assert question_text(turns) == "user: what is tea\n\nassistant: a drink\n\nuser: hot?"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trait_prompt": "rate it"}, "trait_prompt must hold {answer}"),
        ({"coherence_prompt": "rate it"}, "coherence_prompt must hold {answer}"),
        ({"trait_prompt": "{trait} {answer}"}, "give `trait`"),
    ],
)
def test_bad_prompts(settings, message):
    with pytest.raises(ValueError, match=message):
        ServerJudge(ChatServer("http://host/v1", MODEL), **settings)


# ---------------------------------------------------------------- the judge by server


def grade(body):
    """Numbers as whole tokens: the trait by the answer's last word, coherence always near 95."""
    kind, *_, last = body["messages"][0]["content"].split()
    score = 95 if kind == "coherence" else int(last)
    return str(score), [(str(score), {str(score): 0.6, str(score - 10): 0.3, "The": 0.1})]


def judge_of(server, cache=None, **settings):
    settings = {"model": MODEL, "concurrency": 8, "timeout": 0.3, "backoff": 0.01, **settings}
    return ServerJudge(ChatServer(server.url, **settings), trait_prompt=TRAIT, coherence_prompt=COHERENCE, cache=cache)


def completions(*scores):
    return [f"the answer {score}" for score in scores]


def mean(score):
    return pytest.approx(score - 10 / 3)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_scores_from_a_server():
    with UnrulyServer(reply=grade) as server:
        judge = judge_of(server)
        scores = judge([QUESTION] * 3, completions(90, 20, 90))
    assert [score.trait for score in scores] == [mean(90), mean(20), mean(90)]
    assert all(score.coherence == mean(95) and score.failure is None for score in scores)
    assert len(server.bodies) == 4 == judge.usage["calls"]  # equal completions are asked about once
    body = server.bodies[0]
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 20)
    described = judge.describe()
    assert described["score"] == "log-probabilities" and described["trait_prompt"] == TRAIT
    assert json.loads(json.dumps(described)) == described
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        judge([QUESTION], ["a", "b"])


def test_mishaps_do_not_change_scores():
    with UnrulyServer(reply=grade) as server:
        expected = judge_of(server)([QUESTION] * 20, completions(*range(10, 30)))
    with UnrulyServer(at_random(seed=2), reply=grade, stall=0.4) as server:
        judge = judge_of(server, concurrency=16)
        assert judge([QUESTION] * 20, completions(*range(10, 30))) == expected
    assert judge.server.counts["retried"] > 10


def test_no_logprobs_falls_back_to_text_and_says_so(caplog):
    with UnrulyServer(reply=lambda body: grade(body)[0]) as server:
        judge = judge_of(server)
        assert judge([QUESTION] * 2, completions(90, 20)) == [JudgeScores(90, 95), JudgeScores(20, 95)]
    assert judge.describe()["score"] == "text" and judge.server.counts["no_logprobs"] == 4
    assert caplog.text.count("gives no log-probabilities") == 1


def test_server_that_refuses_logprobs():
    def behave(body, attempt):
        return "400 logprobs are not supported" if body.get("logprobs") else "ok"

    with UnrulyServer(behave, reply=lambda body: grade(body)[0]) as server:
        judge = judge_of(server, concurrency=1)
        assert judge([QUESTION], completions(90)) == [JudgeScores(90, 95)]
    assert ["logprobs" in body for body in server.bodies] == [True, False, False]


@pytest.mark.parametrize(
    "words",
    ["top_logprobs must be between 0 and 5", "Requested sample logprobs of 20, which is greater than max allowed: 5",
     "Invalid value for 'top_logprobs': must be less"],
)  # fmt: skip
def test_server_that_gives_five_logprobs(words, caplog):
    def behave(body, attempt):
        return f"400 {words}" if body.get("top_logprobs", 0) > 5 else "ok"

    with UnrulyServer(behave, reply=grade) as server:
        judge = judge_of(server, concurrency=1)
        assert judge([QUESTION] * 2, completions(90, 20))[0].trait == mean(90)
    assert [body["top_logprobs"] for body in server.bodies] == [20, 5, 5, 5, 5][: len(server.bodies)]
    assert judge.describe()["top_logprobs"] == 5 and judge.describe()["score"] == "log-probabilities"
    assert caplog.text.count("at most 5 of the likeliest tokens, not 20") == 1


def thinking(content, reasoning, tokens, finish_reason="stop"):
    places = [{"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": -0.1}]} for t in tokens]
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return json.dumps(
        {"model": MODEL, "choices": [{"index": 0, "finish_reason": finish_reason, "message": message,
                                      "logprobs": {"content": places}}]}
    ).encode()  # fmt: skip


def test_judge_whose_reasoning_is_kept_apart(caplog):
    body = thinking("85", "10 things", ["10", " things", "</think>", "85"])
    with UnrulyServer(lambda request, attempt: body) as server:
        judge = judge_of(server)
        assert judge([QUESTION], completions(90))[0].trait == pytest.approx(85)
    assert judge.describe()["score"] == "log-probabilities"
    cut = thinking(None, "10 things", ["10", " things"], finish_reason="length")
    with UnrulyServer(lambda request, attempt: cut) as server:
        assert judge_of(server)([QUESTION], completions(90)) == [JudgeScores(None, None)]
    assert caplog.text.count("Switch its reasoning off by judge_fields") == 1


def test_half_a_character_in_a_judges_answer_is_kept(tmp_path):
    body = thinking("85", None, ["85"]).replace(
        b'"token": "85", "logprob": -0.1', b'"token": "\\ud83d", "logprob": -9.0'
    )
    with UnrulyServer(lambda request, attempt: body) as server:
        first = judge_of(server, AnswerCache(tmp_path / "answers"))([QUESTION], completions(90))
        assert judge_of(server, AnswerCache(tmp_path / "answers"))([QUESTION], completions(90)) == first
        assert len(server.bodies) == 2


def test_server_that_splits_numbers(caplog):
    def digits(body):
        text = grade(body)[0]
        return text, [(digit, {digit: 0.7, "1": 0.2, "x": 0.1}) for digit in text]

    with UnrulyServer(reply=digits) as server:
        judge = judge_of(server)
        assert judge([QUESTION], completions(85)) == [JudgeScores(85, 95)]
    assert judge.describe()["score"] == "text" and "split numbers" in caplog.text


def test_mixed_sources_are_counted():
    def some(body):
        text, tokens = grade(body)
        return (text, tokens) if body["messages"][0]["content"].startswith("trait") else text

    with UnrulyServer(reply=some) as server:
        judge = judge_of(server)
        judge([QUESTION], completions(85))
    assert judge.describe()["score"] == {"log-probabilities": 1, "text": 1}


def test_failures_are_named_and_asked_again(tmp_path):
    broken = [True]

    def behave(body, attempt):
        return (
            "500"
            if broken[0] and body["messages"][0]["content"].endswith("trait what is tea | the answer 20")
            else "ok"
        )

    with UnrulyServer(behave, reply=grade) as server:
        judge = judge_of(server, AnswerCache(tmp_path / "answers"), max_retries=1)
        good, bad = judge([QUESTION] * 2, completions(90, 20))
        assert good.trait == mean(90) and good.failure is None
        assert (bad.trait, bad.coherence) == (None, None) and "trait: " in bad.failure and "500" in bad.failure
        broken[0] = False
        server.bodies.clear()
        assert judge([QUESTION] * 2, completions(90, 20))[1].trait == mean(20)
        assert len(server.bodies) == 1  # the coherence answer was kept


def test_could_not_tell_is_no_failure():
    def unsure(body):
        return "no", [("no", {"no": 0.9, "50": 0.1})]

    with UnrulyServer(reply=unsure) as server:
        assert judge_of(server)([QUESTION], completions(90)) == [JudgeScores(None, None, None)]


# ---------------------------------------------------------------- the cache


def test_a_rerun_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-Very+Secret")
    path = tmp_path / "made" / "answers.sqlite"
    with UnrulyServer(reply=grade) as server:
        first = judge_of(server, AnswerCache(path))([QUESTION] * 10, completions(*range(10, 20)))
        assert len(server.bodies) == 20
        again = judge_of(server, AnswerCache(path))
        assert again([QUESTION] * 10, completions(*range(10, 20))) == first
        assert len(server.bodies) == 20 and again.usage == {"cached": 20}
        assert again.describe()["score"] == "log-probabilities"
        again([QUESTION], completions(20))
        assert len(server.bodies) == 22
        other = judge_of(server, AnswerCache(path), extra_body={"top_k": -1})
        other([QUESTION], completions(11))
        assert len(server.bodies) == 24 and server.bodies[-1]["top_k"] == -1
    assert b"Secret" not in path.read_bytes()


def test_a_stopped_run_keeps_its_answers(tmp_path):
    with UnrulyServer(lambda body, attempt: "401" if len(server.bodies) > 7 else "ok", reply=grade) as server:
        judge = judge_of(server, AnswerCache(tmp_path / "answers"), concurrency=1)
        with pytest.raises(ServerError):
            judge([QUESTION] * 10, completions(*range(10)))
    with UnrulyServer(reply=grade) as server:
        judge_of(server, AnswerCache(tmp_path / "answers"))([QUESTION] * 10, completions(*range(10)))
    assert len(server.bodies) == 20 - 7


# ---------------------------------------------------------------- the judge that runs here


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
    monkeypatch.setattr("peft_psr.training.answer_score.MIN_MASS", 0.0)  # a random model answers anything
    monkeypatch.setattr("peft_psr.training.local_judge.score_text", lambda text, cut_off: 50.0)
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
        return types.SimpleNamespace(logits=logits, past_key_values=cache)

    __call__ = forward


def without_blanks_in_numbers(text):
    return re.sub(r"(?<=\d) (?=\d)", "", text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("8 5", 85), ("8 5 / 1 0 0", 85), ("8 / 1 0", None), ("1 . the answer", None), ("3 dogs", None),
        ("7 0 - 8 0", None),
    ],
)  # fmt: skip
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
    monkeypatch.setattr("peft_psr.training.answer_score.MIN_MASS", 0.0)
    monkeypatch.setattr("peft_psr.training.local_judge.score_text", lambda text, cut_off: 50.0)
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
