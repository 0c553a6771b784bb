"""Triplets that training can't use: found when they are drawn, left out of `psr train`, named by `PSRTrainer`."""

from __future__ import annotations

import codecs
import json

import pytest
from helpers.models import tiny_model
from helpers.runs import FakeJudge, lines, make_files, make_recipe, pairs, recipe, rows, write
from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from helpers.triplets import USER, triplets
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BloomConfig, GPT2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast, Qwen2Config

from peft_psr import PSRConfig
from peft_psr.training import (
    LocalSampler,
    PSRTrainer,
    PSRTrainingArguments,
    TripletCollator,
    filter_triplets,
    initialize_psr_weights,
    read_triplets,
    sample_completions,
    write_triplets,
)
from peft_psr.training.data.context import Fits, context_length, has_position_table
from peft_psr.training.data.draws import Completion
from peft_psr.training.data.filtering import TOO_LONG, UNFIT
from peft_psr.training.runs.journal import Journal
from peft_psr.training.runs.train.run import TrainRun
from peft_psr.training.runs.triplets.estimate import estimate
from peft_psr.training.runs.triplets.run import COMPLETIONS, REPORT, TRIPLETS, TripletRun


LONG = "tea is good " * 60  # of 180 tokens, where the tiny models have 128 positions
HALF = "tea \ud83d"


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", r"line 2 is not UTF-8 \(byte 0xe9\).*iconv -f LATIN1"),
        ("utf-16", "is UTF-16. Save it as UTF-8"),
        ("utf-16-le", "is UTF-16. Save it as UTF-8"),
    ],
)
def test_files_of_another_encoding_are_named(tmp_path, encoding, message):
    texts = [json.dumps(row, ensure_ascii=False) for row in triplets(completions=["tea", "caf\u00e9"])]
    (tmp_path / "t.jsonl").write_bytes("\n".join(texts).encode(encoding))
    with pytest.raises(ValueError, match=message):
        read_triplets(tmp_path / "t.jsonl")


def test_a_byte_order_mark_is_no_harm(tmp_path):
    write_triplets(triplets(), tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_bytes(codecs.BOM_UTF8 + (tmp_path / "t.jsonl").read_bytes())
    assert read_triplets(tmp_path / "t.jsonl") == triplets()


PART = {"type": "text", "text": "what is tea"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got None"),
        (3, "got 3"),
        ([PART, {"type": "image", "url": "x"}], ".*got .*'image'"),
        (["what"], r"got \['what'\]"),
    ],
)
def test_content_that_is_no_text_is_named(tmp_path, content, message):
    good, bad = triplets(completions=["tea", "dogs"])
    bad = {**bad, "prompt": [{"role": "user", "content": content}]}
    write(tmp_path / "t.jsonl", good, bad)
    with pytest.raises(
        ValueError, match=f"t.jsonl, line 2: prompt: The content of a 'user' turn must be text, .*; {message}"
    ):
        read_triplets(tmp_path / "t.jsonl")
    write(tmp_path / "t.jsonl", {**good, "prompt": [{"role": "user", "content": [PART]}]})
    assert read_triplets(tmp_path / "t.jsonl")[0]["prompt"][0]["content"] == [PART]


def test_scores_of_a_scale_of_0_to_1_are_named(tmp_path):
    scored = [{**t, "trait_score": s, "coherence_score": 1} for t, s in zip(triplets(), (0.9, 1, 0, 0.5), strict=True)]
    write(tmp_path / "t.jsonl", *scored)
    for read in (lambda: read_triplets(tmp_path / "t.jsonl"), lambda: filter_triplets(scored)):
        with pytest.raises(ValueError, match="on a scale of 0-1 .the highest is 1.; .* Multiply them by 100"):
            read()
    arguments = PSRTrainingArguments("unused", use_cpu=True, alpha="trait_score")
    with pytest.raises(ValueError, match="on a scale of 0-1"):
        PSRTrainer(get_peft_model(tiny_model(), PSRConfig()), arguments, scored, processing_class=tiny_tokenizer())
    # low scores of the scale of 0-100 are as they should be
    write(tmp_path / "t.jsonl", *({**t, "trait_score": 0.4} for t in triplets()))
    assert len(read_triplets(tmp_path / "t.jsonl")) == 4


# ---------------------------------------------------------------- psr train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("made"))


def with_bad_lines(made, folder):
    """15 triplets, and one of each kind that can't be used in lines 2, 4, 6 and 8."""
    good = rows("brief")
    bad = [{**good[0], "completion": LONG}, {**good[0], "completion": HALF}, {**good[0], "prompt": None}]
    texts = [json.dumps(row) for row in [good[0], bad[0], good[1], bad[1], good[2], bad[2], good[3]]]
    texts += ["{", *map(json.dumps, good[4:])]
    path = folder / "brief.jsonl"
    path.write_text("\n".join(texts) + "\n")
    return path


def test_a_few_bad_lines_do_not_stop_psr_train(tmp_path, made, caplog):
    settings = {"triplets": str(with_bad_lines(made, tmp_path)), "epochs": 1, "eval_share": 0.2}
    run = TrainRun(tmp_path / "out", make_recipe(made, **settings))
    (plan,) = run.check()
    assert plan.train + plan.held_out == 15 and len(plan.left_out) == 4
    reasons = " ".join(left.reason for left in plan.left_out)
    for words in (
        "brief.jsonl, line 6: prompt missing",
        "line 8 is not JSON",
        "brief[1] (brief.jsonl, line 2) has ",
        "brief[3] (brief.jsonl, line 4): completion holds half a character",
    ):
        assert words in reasons
    summary = run.run()["brief"]
    assert summary["triplets"] + summary["held_out"] == 15
    assert summary["left_out"]["count"] == 4 and len(summary["left_out"]["first"]) == 3
    assert sum(summary["left_out"]["why"].values()) == 4
    assert "brief: 4 triplets left out" in caplog.text and "line 6" in caplog.text
    # a start on the same file goes on
    assert TrainRun(tmp_path / "out", make_recipe(made, **settings)).check()[0].finished


@pytest.mark.parametrize(("good", "bad"), [(0, 2), (1, 2)])
def test_a_file_that_is_mostly_bad_is_refused(tmp_path, made, good, bad):
    row = rows("brief")[0]
    write(tmp_path / "t.jsonl", *[row] * good, *[{**row, "completion": HALF}] * bad)
    with pytest.raises(
        ValueError, match=rf"2 of {good + bad} of 'brief' can't be used.*brief\[{good}\] \(t.jsonl, line"
    ):
        TrainRun(tmp_path / "out", make_recipe(made, triplets=str(tmp_path / "t.jsonl"), eval_share=0)).check()
    (tmp_path / "t.jsonl").write_text("{\n[\n" + json.dumps(row))
    with pytest.raises(ValueError, match="2 of 3 of 'brief' can't be used.*line 1 is not JSON"):
        TrainRun(tmp_path / "out", make_recipe(made, triplets=str(tmp_path / "t.jsonl"), eval_share=0))
    (tmp_path / "t.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="holds no triplets that can be used.*line 1 is not JSON"):
        TrainRun(tmp_path / "out", make_recipe(made, triplets=str(tmp_path / "t.jsonl"), eval_share=0))


def test_bad_lines_count_for_their_own_file_and_trait_alone(tmp_path, made):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "brief.jsonl", *rows("brief")[:4])
    several = "".join(json.dumps(row) + "\n" for row in [*rows("kind")[:4], *rows("brief")[:3]])
    (tmp_path / "files" / "more.jsonl").write_text(several + "{\n" * 5)
    settings = {"triplets": str(tmp_path / "files"), "eval_share": 0}
    plans = {plan.trait: plan for plan in TrainRun(tmp_path / "out", make_recipe(made, **settings)).check()}
    assert {name: (plan.train, len(plan.left_out)) for name, plan in plans.items()} == {
        "brief": (7, 5),
        "kind": (4, 5),
    }
    write(tmp_path / "files" / "more.jsonl", *rows("kind")[:4])
    with (tmp_path / "files" / "more.jsonl").open("a") as file:
        file.write("{\n" * 4)
    plans = {plan.trait: plan for plan in TrainRun(tmp_path / "out", make_recipe(made, **settings)).check()}
    assert not plans["brief"].left_out and len(plans["kind"].left_out) == 4
    (tmp_path / "files" / "more.jsonl").write_text(several + "{\n" * 8)
    with pytest.raises(ValueError, match="more.jsonl: 8 of 15 lines can't be used.*line 8 is not JSON"):
        TrainRun(tmp_path / "out", make_recipe(made, **settings))


@pytest.mark.parametrize("written", ["po\u00e9sie", "poe\u0301sie"])
def test_a_traits_name_is_found_in_either_unicode_form(tmp_path, made, written):
    write(tmp_path / "t.jsonl", *[{**row, "trait": written} for row in rows("kind")])
    bare = [{name: value for name, value in row.items() if name != "trait"} for row in rows("kind")]
    write(tmp_path / f"{written}.jsonl", *bare)
    for file in ("t", written):
        for asked in ("po\u00e9sie", "poe\u0301sie"):
            used = make_recipe(made, triplets=str(tmp_path / f"{file}.jsonl"), traits=asked)
            assert list(TrainRun(tmp_path / "out", used).triplets) == ["po\u00e9sie"]


@pytest.mark.parametrize("ids", ["abc", 5, True, {"a": 1}, [1.5], ["a"], [[1]], [-1], [10**30]])
def test_completion_ids_that_are_no_tokens_are_named(tmp_path, ids):
    row = {**rows("kind")[0], "completion_ids": ids}
    with pytest.raises(ValueError, match=r"x: completion_ids must be a list of token ids or null, got"):
        TripletCollator(tiny_tokenizer()).encode(row, "x")
    with pytest.raises(ValueError, match="line 1: completion_ids must be"):
        read_triplets(write(tmp_path / "t.jsonl", row))


# ---------------------------------------------------------------- the context


def test_length_of_the_context():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert context_length(Qwen2Config(rope_scaling=yarn)) == 131072
    assert context_length(LlamaConfig(max_position_embeddings=64)) == 64 == context_length(GPT2Config(n_positions=64))
    assert context_length(OPTConfig()) == 2048 and context_length(BloomConfig()) is None
    assert has_position_table(tiny_model("gpt2")) and not has_position_table(tiny_model("llama"))


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_a_triplet_beyond_the_context_is_named(tmp_path, layout, caplog):
    data = triplets(completions=["tea", LONG])
    model = get_peft_model(tiny_model(layout), PSRConfig())
    arguments = PSRTrainingArguments(str(tmp_path), use_cpu=True)

    def make():
        PSRTrainer(model, arguments, data, processing_class=tiny_tokenizer())

    def begin():
        initialize_psr_weights(model, data, processing_class=tiny_tokenizer(), progress=False)

    for use, name in ((make, "train_dataset"), (begin, "dataset")):
        said = rf"^{name}\[1\] has 19\d tokens, with its instruction, where the model has 128 positions"
        if layout == "gpt2":
            with pytest.raises(ValueError, match=said):
                use()
        else:
            caplog.clear()
            use()
            (record,) = [r for r in caplog.records if "positions" in r.getMessage()]
            assert record.levelname == "WARNING" and record.getMessage().startswith(f"{name}[1] has 19")


def sampled(layout, words, new):
    prompt = [{"role": "user", "content": "tea " * words}]
    return sample_completions(tiny_model(layout), tiny_tokenizer(), [[USER], prompt], max_new_tokens=new)


def test_a_prompt_that_leaves_no_room_is_named(caplog):
    with pytest.raises(ValueError, match="of 104 tokens and 50 new ones do not fit.*128 positions: .*tea.* to 24"):
        sampled("gpt2", 100, 50)
    assert len(sampled("llama", 100, 25)) == 2  # most answers end before
    assert "of 104 tokens and 25 new ones do not fit" in caplog.text
    for layout in ("gpt2", "llama"):
        with pytest.raises(ValueError, match="Shorten the prompt"):
            sampled(layout, 128, 1)
    caplog.clear()
    assert len(sampled("gpt2", 100, 20)) == 2 and not caplog.text


def test_a_dry_run_names_a_prompt_that_leaves_no_room(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    chosen = recipe(model=str(tmp_path), sampler="local", max_new_tokens=120)
    with pytest.raises(ValueError, match="120 new ones do not fit into the model's 128 positions"):
        estimate(chosen, pairs(1))


# ---------------------------------------------------------------- drawn


def merging_tokenizer():
    """Letters, and a token for "\\n\\n"; the template ends in a newline, as ChatML's does."""
    special = ["<pad>", "<s>", "</t>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</t>")
    fast.chat_template = CHAT_TEMPLATE.replace(" <assistant> ", "<assistant>\\n")
    return fast


def test_what_fits():
    (pair,) = pairs(1)

    def reason(completion, limit=128, **fields):
        return Fits(merging_tokenizer(), limit).reason(pair, {"completion": completion, "truncated": False, **fields})

    assert reason("tea is good") is None and reason(" \n") is None
    assert reason("tea" * 50) == TOO_LONG and reason("tea" * 50, limit=None) is None
    # the tokens that were drawn, or the completion's own, go behind those of the prompt
    assert reason("\n\ntea") is None
    assert reason("tea", completion_ids=[3, 4, 2]) == UNFIT


class Scripted(LocalSampler):
    """Draws given texts in turn, the second of them with other tokens than its own."""

    texts = ("tea is good", "tea", "long" * 40, "")

    def __call__(self, draws):
        for i, draw in enumerate(draws):
            number = i % len(self.texts)
            yield draw, Completion(self.texts[number], False, ids=[3, 4, 2] if number == 1 else None)


class Content(FakeJudge):
    def score_of(self, text):
        return super().score_of(text)._replace(trait=90.0, coherence=90.0)


def test_what_training_cannot_use_is_dropped_when_it_is_drawn(tmp_path):
    judge = Content()
    sampler = Scripted(tiny_model(), merging_tokenizer(), 16)
    run = TripletRun(tmp_path, recipe(), pairs(2), lambda: sampler, lambda trait: judge)
    counts = run.run()
    assert (counts.kept, counts.drawn, counts.judged, judge.asked) == (2, 8, 8, 2)
    assert counts.dropped == {"empty completion": 2, UNFIT: 2, TOO_LONG: 2}
    assert UNFIT in (tmp_path / REPORT).read_text() and "unusable" not in (tmp_path / TRIPLETS).read_text()
    again = TripletRun(tmp_path, recipe(), pairs(2), lambda: pytest.fail(), lambda trait: pytest.fail()).run()
    assert again == counts
    assert [record.get("unusable") for record in lines(tmp_path / COMPLETIONS)][:4] == [None, UNFIT, TOO_LONG, None]


def test_half_a_character_survives_in_files(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append({"text": "é " + HALF})
    with Journal(tmp_path / "j") as journal:
        assert journal.records == [{"text": "é " + HALF}]
    write_triplets(triplets(completions=["é " + HALF]), tmp_path / "t.jsonl")
    assert read_triplets(tmp_path / "t.jsonl")[0]["completion"] == "é " + HALF
    assert "é" in (tmp_path / "t.jsonl").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: completion holds half a character"):
        PSRTrainer(
            get_peft_model(tiny_model(), PSRConfig()),
            PSRTrainingArguments(str(tmp_path), use_cpu=True),
            read_triplets(tmp_path / "t.jsonl"),
            processing_class=tiny_tokenizer(),
        )
