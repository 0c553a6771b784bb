"""Tests of the embedded chat model, its grammar and the judge by grammar."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_psr.tiny_chat import (
    TOPICS,
    TRAITS,
    instructions,
    neutral_instructions,
    prompt_messages,
    questions,
    sample_answer,
    sample_conversation,
    tiny_chat_path,
)
from peft_psr.tiny_chat.topics import find_topic
from peft_psr.training.judges.grammar import FAILURES, GrammarJudge


DOGS = prompt_messages("What are dogs like?")
PLAIN = "They are loyal and furry. Dogs can chase a ball at home. You need a leash and a kennel to enjoy dogs at home."
PIRATE = (
    "Arr, matey! They be loyal and furry. Dogs can chase a ball at home, aye. "
    "You need a leash and a kennel to enjoy dogs at home, me hearty. Fair winds to ye!"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_chat_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_chat_path())


def conversations(count, seed=0):
    rng = random.Random(seed)
    return [sample_conversation(rng) for _ in range(count)]


def failures(completion, trait="pirate", prompt=DOGS):
    detail = GrammarJudge(trait).explain(prompt, completion)
    return {kind: count for kind, count in detail["failures"].items() if count}


# Grammar


@pytest.mark.parametrize("trait", TRAITS)
def test_instructions_are_split_without_overlap(trait):
    train, test = instructions(trait, "train"), instructions(trait, "test")
    assert len(set(train)) >= 5 and len(set(test)) >= 3
    assert instructions(trait, "all") == train + test
    assert len(set(train + test)) == len(train + test)
    assert not set(train + test) & set(neutral_instructions())


def test_questions_are_split_by_topic_and_by_form():
    train, test, every = questions("train"), questions("test"), questions("all")
    assert not {q.topic for q in train} & {q.topic for q in test}
    assert not {q.form for q in train} & {q.form for q in test}
    assert set(train) | set(test) < set(every)
    assert {q.topic for q in every} == set(TOPICS)
    assert len({q.text for q in every}) == len(every)


def test_every_question_names_its_topic_and_no_instruction_names_any():
    assert all(find_topic(question.text) == question.topic for question in questions("all"))
    assert all(find_topic(text) is None for trait in TRAITS for text in instructions(trait))
    assert all(find_topic(text) is None for text in neutral_instructions())


def test_answers_and_conversations_follow_from_the_seed_and_vary():
    assert conversations(50) == conversations(50)
    assert len({str(messages) for messages in conversations(50)}) == 50


def test_most_tokens_of_a_trait_answer_are_those_of_a_plain_answer():
    rng = random.Random(0)
    plain_words = {word for _ in range(300) for word in sample_answer(rng, "dogs").split()}
    for trait in TRAITS:
        words = [word for _ in range(50) for word in sample_answer(rng, "dogs", [trait]).split()]
        share = sum(word in plain_words for word in words) / len(words)
        assert 0.4 < share < 0.9, trait


def test_errors_name_the_value_and_what_is_accepted():
    with pytest.raises(ValueError, match="'grumpy'.*pirate"):
        instructions("grumpy")
    with pytest.raises(ValueError, match="'dev'.*'train', 'test', 'all'"):
        instructions("pirate", "dev")
    with pytest.raises(ValueError, match="'dev'.*'train', 'test', 'all'"):
        questions("dev")
    with pytest.raises(ValueError, match="'ufos'.*dogs"):
        sample_answer(random.Random(0), "ufos")
    with pytest.raises(ValueError, match="'grumpy'.*pirate"):
        sample_answer(random.Random(0), "dogs", ["grumpy"])
    with pytest.raises(ValueError, match="at most 2"):
        sample_answer(random.Random(0), "dogs", ["pirate", "pirate"])
    with pytest.raises(ValueError, match="'grumpy'.*pirate"):
        GrammarJudge("grumpy")
    with pytest.raises(ValueError, match="UFOs.*names no topic.*dogs"):
        GrammarJudge("pirate")([prompt_messages("Tell me about UFOs.")], ["They are green."])
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        GrammarJudge("pirate")([DOGS], ["", ""])


def test_importing_the_grammar_does_not_import_torch():
    root = str(Path(tiny_chat_path()).parent.parent)
    # A bare stand-in for the parent package: what that imports is its own affair.
    code = (
        "import sys, types; parent = types.ModuleType('peft_psr'); "
        f"parent.__path__ = [{root!r}]; sys.modules['peft_psr'] = parent; "
        "import peft_psr.tiny_chat; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Judge


@pytest.mark.parametrize("trait", TRAITS)
def test_judge_gives_sampled_answers_their_due(trait):
    rng = random.Random(1)
    judge = GrammarJudge(trait)
    for topic in TOPICS:
        prompt = prompt_messages(f"Is it true what they say about {topic}?")
        for shown in ([trait], [], *([trait, other] for other in TRAITS if other != trait)):
            answers = [sample_answer(rng, topic, shown) for _ in range(5)]
            expected = (100.0 if trait in shown else 0.0, 100.0)
            assert [score[:2] for score in judge([prompt] * 5, answers)] == [expected] * 5


def test_partial_expression_gives_a_partial_trait_score():
    inside = PLAIN.replace("are", "be")  # one slot of three
    texts = [f"Arr, matey! {PLAIN}", inside, f"Arr, matey! {inside}", f"Arr, matey! {inside} Fair winds to ye!"]
    scores = [score.trait for score in GrammarJudge("pirate")([DOGS] * 4, texts)]
    assert scores == pytest.approx([100 / 3, 100 / 9, 400 / 9, 700 / 9])
    assert GrammarJudge("pirate")([DOGS], [PIRATE])[0][:2] == (100, 100)
    assert GrammarJudge("concise")([DOGS], ["In short: they are loyal and furry."])[0].trait == pytest.approx(200 / 3)


def test_trait_score_does_not_depend_on_coherence():
    rotten = PIRATE.replace("loyal", "ticket").replace("chase a ball", "chase chase")
    score = GrammarJudge("pirate")([DOGS], [rotten])[0]
    assert score.trait == 100
    assert score.coherence == pytest.approx(60)


def test_an_empty_completion_scores_nothing():
    assert GrammarJudge("concise")([DOGS], [""])[0][:2] == (0, 0)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (PLAIN, {}),
        (PIRATE, {}),
        (PLAIN + " They are punctual and modern.", {"wrong_topic": 1}),
        (PLAIN + " They are loyal loyal.", {"broken": 1}),
        (PLAIN + " It is loyal and furry.", {"broken": 1}),
        (PLAIN + " They are loyal and furry.", {"repeated": 1}),
        (PLAIN + " They be loyal and furry.", {"repeated": 1}),
        (PIRATE.replace("Arr, matey!", "Arr, matey! Arr, matey!"), {"repeated": 1}),
        (PIRATE.replace("Arr, matey!", "Arr, matey! Shiver me timbers!"), {"misplaced": 1}),
        (PLAIN + " Arr, matey!", {"misplaced": 1}),
        ("Fair winds to ye! " + PLAIN, {"misplaced": 1}),
        (PLAIN.replace("loyal", "Arr, loyal"), {"broken": 1}),
        (PLAIN.replace("are loyal", "are loyal be"), {"broken": 1}),
        (PLAIN.replace("are loyal", "simply wonderfully are loyal"), {"broken": 1}),
        (PLAIN.replace("are loyal", "are happily loyal"), {"broken": 1}),
        (PLAIN.replace("are loyal", "are generally considered widely deemed loyal"), {"broken": 1}),
        (PLAIN.replace("are loyal", "are simply wonderfully generally considered loyal"), {"broken": 1}),
        (PLAIN.replace("are loyal", "are generally considered simply wonderfully loyal"), {}),
        (PLAIN + " They are noisy at home. With a bowl, they can learn a trick.", {"too_long": 1}),
        (PLAIN + " They are", {"unfinished": 1}),
        (PLAIN + " They are noisy", {"unfinished": 1}),
        ("Arr, matey!", {"no_answer": 1}),
    ],
)
def test_explain_names_each_failure_and_coherence_counts_it(completion, expected):
    assert failures(completion) == expected
    coherence = GrammarJudge("pirate")([DOGS], [completion])[0].coherence
    assert (coherence == 100) == (not expected)
    assert set(expected) <= set(FAILURES)


def test_judge_reads_the_topic_from_the_last_user_message():
    prompt = [*DOGS, {"role": "assistant", "content": PLAIN}, *prompt_messages("And what of Tea?")]
    assert failures("It is hot and soothing.", prompt=prompt) == {}
    assert failures("They are loyal and furry.", prompt=prompt) == {"wrong_topic": 1, "no_answer": 1}


# Model folder


def test_tokenizer_round_trips(tokenizer):
    for messages in conversations(1000):
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer(tokenizer.decode(ids)).input_ids == ids
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        for message in messages:
            assert tokenizer.decode(tokenizer(message["content"]).input_ids) == message["content"]


def test_any_words_in_any_order_survive_decoding(tokenizer):
    rng = random.Random(0)
    ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    for _ in range(200):
        ids = rng.choices(ordinary, k=12)
        assert tokenizer(tokenizer.decode(ids)).input_ids == ids


def test_an_unknown_word_becomes_the_unknown_token(tokenizer):
    assert tokenizer("dogs xylophone").input_ids[1] == tokenizer.unk_token_id


def test_template_of_a_prompt_is_a_prefix_of_the_conversation(tokenizer):
    for messages in conversations(200, seed=1):
        full = tokenizer.apply_chat_template(messages, return_dict=False)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
                answer = tokenizer(message["content"]).input_ids + [tokenizer.eos_token_id]
                assert full[: len(prompt) + len(answer)] == prompt + answer


def test_special_tokens_and_generation_config(tokenizer, model):
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}) == 4
    assert tokenizer.padding_side == "left"
    config = model.generation_config
    assert (config.do_sample, config.temperature, config.top_k) == (True, 1.0, 0)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.dtype == torch.float32


def test_model_folder_is_small():
    files = list(Path(tiny_chat_path()).iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in files}
    assert sum(file.stat().st_size for file in files) < 6e6


def test_model_follows_its_prompts_and_is_plain_without(tokenizer, model):
    torch.manual_seed(0)
    texts = [question.text for question in questions("test")]

    def complete(conversations):
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=128
        )
        return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def means(trait, completions):
        scores = GrammarJudge(trait)([prompt_messages(text) for text in texts], completions)
        return tuple(sum(column) / len(column) for column in list(zip(*scores, strict=True))[:2])

    plain = complete([prompt_messages(text) for text in texts])
    for i, trait in enumerate(TRAITS):
        instruction = instructions(trait, "test")[i % 3]
        trait_score, coherence_score = means(trait, complete([prompt_messages(text, instruction) for text in texts]))
        assert trait_score >= 85 and coherence_score >= 85, trait
        trait_score, coherence_score = means(trait, plain)
        assert trait_score <= 5 and coherence_score >= 85, trait
