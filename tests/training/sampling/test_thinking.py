"""Models that think aloud: who sees the reasoning (training), who does not (judges, checkers, the next turn)."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import byte_model, script
from helpers.tokenizers import HARMONY, THINKING, byte_tokenizer
from helpers.unruly_server import MODEL, UnrulyServer
from peft import get_peft_model
from typer.testing import CliRunner

from peft_psr import PSRConfig
from peft_psr.cli import app
from peft_psr.evaluation.measures.scoring import judged_answers
from peft_psr.prompts.conversations import encode_prompt
from peft_psr.serving.chat_session import ChatSession
from peft_psr.training import generate_triplets, read_triplets, sample_completions
from peft_psr.training.data.draws import Completion, PromptPair
from peft_psr.training.data.filtering import NO_ANSWER
from peft_psr.training.judges.base import JudgeScores
from peft_psr.training.runs.train.recipe import load_train_recipe
from peft_psr.training.runs.train.run import TrainRun
from peft_psr.training.runs.triplets.recipe import load_recipe
from peft_psr.training.runs.triplets.run import MANIFEST, SCORES, TRIPLETS, TripletRun
from peft_psr.training.sampling.chat_server import ChatServer
from peft_psr.training.sampling.server import ServerSampler


USER = [{"role": "user", "content": "what is tea"}]
STEERED = [{"role": "system", "content": "be formal"}, *USER]


class Listening:
    """A judge that keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, prompts, completions):
        self.shown += completions
        return [JudgeScores(90.0, 80.0) for _ in completions]


# ---------------------------------------------------------------- judges


@pytest.mark.parametrize(
    ("said", "shown"), [("<think>hm</think>\n\ntea", ["tea"]), ("<think>hm", []), ("tea", ["tea"])]
)
def test_what_is_judged_and_what_is_kept(monkeypatch, said, shown):
    tokenizer, model, judge = byte_tokenizer(THINKING), byte_model(), Listening()
    script(monkeypatch, model, tokenizer(said + "<|im_end|>")["input_ids"])
    (row,) = generate_triplets(model, tokenizer, ["be formal"], [USER], judge, 1, 60, temperature=0.0, progress=False)
    assert judge.shown == shown and row["completion"] == said and row["trait_score"] == (90.0 if shown else None)
    script(monkeypatch, model, tokenizer(said + "<|im_end|>")["input_ids"])
    sampling = {"max_new_tokens": 60, "temperature": 0.0}
    (answers,) = judged_answers(model, tokenizer, [USER], [USER], [0], judge, sampling)
    assert judge.shown == shown * 2 and answers.texts == [said] and len(answers.scores) == 1


@pytest.mark.parametrize(("said", "answer"), [("so</think>tea", "tea"), ("so", None)])
def test_reasoning_that_a_prompt_has_begun_is_not_judged(monkeypatch, said, answer):
    tokenizer, model = byte_tokenizer(THINKING.replace(".split('</think>')[-1]", "")), byte_model()
    script(monkeypatch, model, tokenizer(said + "<|im_end|>")["input_ids"])
    begun = [*USER, {"role": "assistant", "content": "<think>\nOkay,"}]
    (drawn,) = sample_completions(model, tokenizer, [begun], 60, temperature=0.0)
    assert drawn.text == said and drawn.opened and drawn.answer == answer


def test_a_run_judges_answers_and_says_what_had_none(tmp_path):
    said = {
        0: "<think>hm</think>tea",
        1: "<think>hm",
        2: "hm</think>good",
        3: "so, hm",
        4: "yes",
        5: "<think>a</think> ",
    }

    class Sampler:
        def describe(self):
            return {"engine": "fake", "model": "m"}

        def __call__(self, draws):
            for number, draw in enumerate(draws):
                yield draw, Completion(said[number], truncated=False, opened=number in (2, 3))

    recipe = load_recipe(None, {"source": "personas", "model": "m", "judge": "local", "judge_model": "j", "draws": 6})
    judge = Listening()
    run = TripletRun(tmp_path, recipe, [PromptPair("formal/0", "formal", USER, STEERED)], Sampler, lambda trait: judge)
    counts = run.run()
    assert judge.shown == ["tea", "good", "yes"] and counts.kept == 3 and counts.dropped == {NO_ANSWER: 3}
    assert [row["completion"] for row in read_triplets(tmp_path / TRIPLETS)] == [said[0], said[2], said[4]]
    again = TripletRun(tmp_path, recipe, run.pairs, lambda: pytest.fail("drawn"), lambda trait: pytest.fail("judged"))
    assert again.run() == counts and len((tmp_path / SCORES).read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_server_that_keeps_reasoning_back_does_not_give_what_was_drawn(tmp_path, name):
    message = {"role": "assistant", "content": "tea", name: "hm"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    reply = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    recipe = load_recipe(None, {"source": "personas", "model": "m", "judge": "local", "judge_model": "j", "draws": 1})
    pairs = [PromptPair("formal/0", "formal", USER, STEERED)]
    with UnrulyServer(lambda body, attempt: json.dumps(reply).encode()) as server:
        sampler = ServerSampler(ChatServer(server.url, MODEL), 5)
        run = TripletRun(tmp_path, recipe, pairs, lambda: sampler, lambda trait: pytest.fail("judged"))
        with pytest.raises(ValueError, match="reasoning apart.*--template-args"):
            run.run()


# ---------------------------------------------------------------- chat


def session(template, **settings):
    extra = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"] if template is HARMONY else []
    tokenizer = byte_tokenizer(template, "<|return|>" if extra else "<|im_end|>", extra)
    model = get_peft_model(byte_model(), PSRConfig(), adapter_name="formal").eval()
    return ChatSession(model, tokenizer, **{"max_new_tokens": 60, "temperature": 0.0, **settings})


def ask(monkeypatch, chat, said):
    pieces = []
    script(monkeypatch, chat.model.get_base_model(), chat.processing_class(said)["input_ids"])
    return chat.ask("what is tea", pieces.append), "".join(pieces)


@pytest.mark.parametrize(
    ("template", "said", "end", "turn"),
    [
        (THINKING, "<think>hm</think>\n\ntea", "<|im_end|>", "tea"),
        (THINKING, "tea <|endoftext|> good", "<|im_end|>", "tea <|endoftext|> good"),
        (
            HARMONY,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>tea",
            "<|return|>",
            "tea",
        ),
    ],
)
def test_the_conversation_goes_on_from_the_answer(monkeypatch, template, said, end, turn):
    chat = session(template)
    answer, printed = ask(monkeypatch, chat, said + end)
    assert answer.text == printed == said and answer.turn == turn and answer.cut is None
    assert chat.messages[-1] == {"role": "assistant", "content": turn}
    again, _ = ask(monkeypatch, chat, said + end)
    assert again.prompt["steering_mask"].sum() > 1 and len(chat.messages) == 4
    assert chat.gates()["formal"].plain.replace("↵", "") == said


def test_reasoning_that_was_cut_off_is_no_turn(monkeypatch):
    chat = session(THINKING, max_new_tokens=12)
    ask(monkeypatch, chat, "tea<|im_end|>")
    before = list(chat.messages)
    answer, _ = ask(monkeypatch, chat, "<think>hm, well, let me")
    assert answer.turn is None and answer.cut == "max_new_tokens" and chat.messages == before


def test_the_likeliest_token_whatever_the_models_settings_are(monkeypatch):
    chat = session(THINKING)
    expected = chat.ask("what is tea").text
    chat.reset()
    config = chat.model.get_base_model().generation_config
    config.repetition_penalty, config.suppress_tokens, config.num_beams, config.do_sample = 5.0, [*range(90)], 3, True
    assert chat.ask("what is tea").text == expected
    sampling = session(THINKING, temperature=1.0)
    sampling.model.get_base_model().generation_config.num_beams = 3
    assert sampling.ask("what is tea").ids.numel()


def test_a_text_that_ends_answers(monkeypatch):
    chat = session(THINKING)
    chat.model.get_base_model().generation_config.stop_strings = ["good"]
    chat.model.get_base_model().generation_config.return_dict_in_generate = True
    answer, printed = ask(monkeypatch, chat, "tea is good for you")
    assert answer.text == printed == "tea is good" and answer.cut is None


# ---------------------------------------------------------------- arguments of the template are part of a run


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    byte_model().save_pretrained(tmp_path / "base")
    byte_tokenizer(THINKING).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def write_rows(path, **fields):
    row = {"prompt": USER, "steered_prompt": STEERED, "completion": "tea is good", "trait_score": 90.0, **fields}
    path.write_text("".join(json.dumps({**row, "trait": "formal"}) + "\n" for _ in range(2)))
    return str(path)


def train_run(tmp_path, model, triplets, **options):
    chosen = {"model": model, "triplets": triplets, "epochs": 1, **options}
    return TrainRun(tmp_path / "out", load_train_recipe(None, chosen))


def test_drawn_with_other_arguments_than_trained_with(tmp_path, model):
    quiet = {"enable_thinking": False}
    drawn = write_rows(tmp_path / "quiet.jsonl", template_args=quiet, template_hash=None)
    with pytest.raises(ValueError, match=r"""Train with --template-args '{"enable_thinking": false}'"""):
        train_run(tmp_path, model, drawn).check()
    run = train_run(tmp_path, model, drawn, template_args=quiet)
    run.check()
    assert encode_prompt(run._tokenizer, USER)[-4:] == run._tokenizer("</think>\n\n")["input_ids"][-4:]
    plain = write_rows(tmp_path / "plain.jsonl", template_args=None)
    with pytest.raises(ValueError, match="Train with --template-args '{}'"):
        train_run(tmp_path, model, plain, template_args=quiet).check()
    train_run(tmp_path, model, plain).check()
    train_run(tmp_path, model, write_rows(tmp_path / "old.jsonl"), template_args=quiet).check()  # says nothing


def test_an_adapter_says_with_which_arguments_it_was_trained(tmp_path, model):
    quiet = {"enable_thinking": False}
    run = train_run(tmp_path, model, write_rows(tmp_path / "rows.jsonl"), template_args=quiet)
    run.run()
    card = (tmp_path / "out" / "formal" / "README.md").read_text(encoding="utf-8")
    assert "set_chat_template(tokenizer, template_args={'enable_thinking': False})" in card
    said = CliRunner().invoke(app, ["chat", str(tmp_path / "out" / "formal"), "--max-new-tokens", "3"], input="tea\n")
    assert said.exit_code == 0, said.output
    with pytest.raises(ValueError, match="template_args"):
        train_run(tmp_path, model, str(tmp_path / "rows.jsonl"), template_args={"enable_thinking": True}).check()


def test_a_local_run_says_it_in_every_row(tmp_path, model):
    asked = ["triplets", "personas-local", "--model", model, "--traits", "formal", "--instructions", "1"]
    asked += ["--questions", "2", "--draws", "1", "--max-new-tokens", "4", "--output", str(tmp_path / "run")]
    asked += ["--judge-model", model, "--template-args", '{"enable_thinking": false}', "--min-coherence-score", "0"]
    CliRunner().invoke(app, asked)
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert manifest["sampler"]["template_args"] == {"enable_thinking": False}
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [row["template_args"] for row in rows] == [{"enable_thinking": False}] * 2
    again = CliRunner().invoke(app, [*asked, "--template-args", '{"enable_thinking": true}'])
    assert again.exit_code == 2 and "template_args" in again.output


@pytest.mark.parametrize("args", ["{", "[1]", '{"messages": 1}'])
def test_arguments_that_are_none(tmp_path, model, args):
    for command in (
        ["train", "fast", "--triplets", "x", "--output", "y"],
        ["chat", "f=x"],
        ["show", "f=x", "--text", "t"],
    ):
        said = CliRunner().invoke(app, [*command, "--model", model, "--template-args", args])
        assert said.exit_code == 2 and "Traceback" not in said.output
