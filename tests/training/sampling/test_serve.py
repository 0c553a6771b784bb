"""End to end against a real server: `transformers serve` on loopback, asked through the `openai` client."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_psr.positions import pad_rows
from peft_psr.prompts.conversations import encode_prompt
from peft_psr.tiny_chat import instructions, prompt_messages, questions, sample_answer, tiny_chat_path
from peft_psr.training.data.draws import Completion, Draw, draw_seed
from peft_psr.training.judges.answer_cache import AnswerCache
from peft_psr.training.judges.grammar import GrammarJudge
from peft_psr.training.judges.local import LocalJudge
from peft_psr.training.judges.server import ServerJudge
from peft_psr.training.sampling.chat_server import ChatServer
from peft_psr.training.sampling.server import ServerSampler


MISSING = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {MISSING}: pip install transformers[serving]"),
]

TRAIT = "sycophantic"
TRAIT_PROMPT, COHERENCE_PROMPT = "trait : {answer}", "coherence : {answer}"


@pytest.fixture(scope="module")
def server_url(tmp_path_factory):
    """One server for any model folder; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("hub")
    (home / "hub").mkdir()
    log = home / "serve.log"
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
        else:
            pytest.fail(f"no server after two minutes: {log.read_text()}")
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def grader_path(tmp_path_factory) -> str:
    """The embedded model, with the numbers added to its words, taught to grade its own trait and coherence."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_path())
    tokenizer.add_tokens(["trait", "coherence", *map(str, range(101))])
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_path())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = random.Random(0)
    topics = sorted({question.topic for question in questions("train")})
    for _ in range(60):
        rows, targets = [], []
        for _ in range(16):
            shown = rng.random() < 0.5
            text = sample_answer(rng, rng.choice(topics), [TRAIT] if shown else [])
            template, score = rng.choice([(TRAIT_PROMPT, "90" if shown else "10"), (COHERENCE_PROMPT, "95")])
            rows.append(encode_prompt(tokenizer, prompt_messages(template.format(answer=text))))
            targets.append(tokenizer.convert_tokens_to_ids(score))
        mask = pad_rows([[1] * len(row) for row in rows], 0)
        logits = model(input_ids=pad_rows(rows, 0), attention_mask=mask).logits[:, -1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("grader")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pairs(count):
    chosen = random.Random(1).sample(list(questions("test")), count)
    plain = [prompt_messages(question.text) for question in chosen]
    steered = [prompt_messages(question.text, instructions(TRAIT)[0]) for question in chosen]
    return plain, steered


def draw_all(sampler, prompts):
    draws = [Draw(f"{TRAIT}/0/{i}", prompt, draw_seed(0, str(i))) for i, prompt in enumerate(prompts)]
    return [sample for _, sample in sorted(sampler(draws), key=lambda pair: int(pair[0].id.rpartition("/")[2]))]


def test_sampled_and_judged_through_the_openai_client(server_url, grader_path, tmp_path):
    sampler = ServerSampler(ChatServer(server_url, tiny_chat_path(), concurrency=4), max_new_tokens=120)
    plain, steered = pairs(8)
    samples = draw_all(sampler, [*plain, *steered])
    assert all(isinstance(sample, Completion) and sample.text for sample in samples)
    assert all(sample.prompt_tokens > 5 and sample.completion_tokens > 5 for sample in samples)
    assert sampler.describe()["seen"]["models"] == [f"{tiny_chat_path()}@main"]
    exact = GrammarJudge(TRAIT)([*plain, *plain], [sample.text for sample in samples])
    assert sum(score.trait for score in exact[:8]) / 8 < 20 and sum(score.trait for score in exact[8:]) / 8 > 80

    grader = ChatServer(server_url, grader_path, concurrency=4)
    prompts = {"trait_prompt": TRAIT_PROMPT, "coherence_prompt": COHERENCE_PROMPT}
    judge = ServerJudge(grader, **prompts, cache=AnswerCache(tmp_path / "answers"))
    scores = judge([*plain, *plain], [sample.text for sample in samples])
    assert judge.describe()["score"] == "text"  # this server gives no log-probabilities
    assert [score.trait > 50 for score in scores] == [score.trait > 50 for score in exact]
    assert all(score.coherence > 80 for score in scores)

    again = ServerJudge(grader, **prompts, cache=AnswerCache(tmp_path / "answers"))
    assert again([*plain, *plain], [sample.text for sample in samples]) == scores and again.usage["calls"] == 0

    tokenizer = AutoTokenizer.from_pretrained(grader_path)
    local = LocalJudge(AutoModelForCausalLM.from_pretrained(grader_path), tokenizer, **prompts)
    for mine, its in zip(local([*plain, *plain], [sample.text for sample in samples]), scores, strict=True):
        assert abs(mine.trait - its.trait) < 25 and abs(mine.coherence - its.coherence) < 25


def test_seeds_one_at_a_time(server_url):
    _, steered = pairs(4)
    sampler = ServerSampler(ChatServer(server_url, tiny_chat_path(), concurrency=1), max_new_tokens=60)
    first = draw_all(sampler, [*steered, steered[0]])
    assert draw_all(sampler, [*steered, steered[0]]) == first
    assert first[0] != first[4]  # one prompt, two seeds


def test_plain_text_and_the_token_limit(server_url):
    sampler = ServerSampler(ChatServer(server_url, tiny_chat_path(), concurrency=2), max_new_tokens=3)
    (sample,) = draw_all(sampler, ["Tea is"])
    assert sample.truncated and sample.completion_tokens == 3
