"""LLM judges: the score from log-probabilities, digits in tokens of their own, text only, the cache."""

from __future__ import annotations

import functools
import json
import math

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
from peft_psr.training.answer_score import number_masses, score_answer, score_text, weighted_mean
from peft_psr.training.llm_judge import ServerJudge, fill_prompt, question_text
from peft_psr.training.local_judge import LocalJudge, number_tokens
from peft_psr.training.server import ChatServer, ServerError
from peft_psr.training.server_replies import Answer


TRAIT, COHERENCE = "trait {question} | {answer}", "coherence {question} | {answer}"
QUESTION = [{"role": "user", "content": "what is tea"}]


def spread(*pairs):
    return [(token, math.log(p)) for token, p in pairs]


def answer(text, *places, finish_reason="stop"):
    return Answer(text, finish_reason, list(places) or None)


# ---------------------------------------------------------------- scores


def test_score_is_the_weighted_mean_of_the_numbers():
    tokens = spread(("80", 0.5), (" 90", 0.2), ("90", 0.1), ("100", 0.1), ("The", 0.05), ("101", 0.01), ("007", 0.01))
    assert number_masses(tokens) == pytest.approx({80: 0.5, 90: 0.3, 100: 0.1})
    assert score_answer(answer("80", ("80", tokens))).score == pytest.approx((40 + 27 + 10) / 0.9)
    assert score_answer(answer("80", ("80", tokens))).source == "log-probabilities"


def test_too_little_mass_is_no_score():
    assert weighted_mean({50: 0.2499}) is None and weighted_mean({50: 0.2501}) == 50
    refusal = answer("I can't", ("I", spread(("I", 0.7), ("50", 0.2))), ("can't", spread(("can't", 0.9))))
    assert score_answer(refusal) == (None, "log-probabilities")
    assert weighted_mean({}) is None


def test_digits_in_tokens_of_their_own():
    digits = spread(("8", 0.6), ("7", 0.3), ("1", 0.05))
    split = answer("85", ("8", digits), ("5", spread(("5", 0.5), ("0", 0.4))))
    assert score_answer(split) == (85.0, "text")
    # 7 may be a score or the first digit of one: only the text tells
    assert score_answer(answer("7", ("7", digits))) == (7.0, "text")
    # a token of two digits among the candidates settles it
    whole = answer("7", ("7", spread(("7", 0.5), ("10", 0.5))))
    assert score_answer(whole) == (pytest.approx(8.5), "log-probabilities")
    # "10" "0"
    hundred = answer("100", ("10", spread(("10", 0.9), ("9", 0.1))), ("0", spread(("0", 0.9))))
    assert score_answer(hundred) == (100.0, "text")


def test_blank_first_token():
    numbers = spread(("85", 0.6), ("90", 0.4))
    blank = answer(" 85", (" ", spread((" ", 0.99))), ("85", numbers))
    assert score_answer(blank) == (pytest.approx(87), "log-probabilities")
    assert score_answer(answer("\u258185", ("\u258185", spread(("\u258185", 1.0))))).score == pytest.approx(85)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("85", 85), (" 85.5\n", 85.5), ("85/100", 85), ("Score: 85", 85), ("0", 0), ("100 of 100", 100),
        ("", None), ("REFUSAL", None), ("101", None), ("-5", None), ("from 0 to 100: 85", None),
    ],
)  # fmt: skip
def test_score_of_a_text(text, score):
    assert score_text(text) == score


def test_number_that_may_be_cut_off():
    assert score_text("The score is 8", cut_off=True) is None
    assert score_answer(answer("The score is 8", finish_reason="length")) == (None, "text")
    assert score_text("8 of 100, for it is", cut_off=True) == 8


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


@torch.no_grad()
def test_whole_numbers_are_scored_as_from_a_server(monkeypatch):
    monkeypatch.setattr("peft_psr.training.answer_score.MIN_MASS", 0.0)
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
