"""Traits: those that ship, folders and files in the Persona Vectors layout, the Hub, and drafts by a chat model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from peft_psr.training.judges.prompts import COHERENCE_PROMPT, TRAIT_PROMPT
from peft_psr.training.runs.drafting import NOTE, draft_trait
from peft_psr.training.sources.personas import SPLIT_FOLDERS, list_traits, parse_trait, read_trait, trait_pairs


def content(split="train", **fields):
    return {
        "instruction": [{"pos": f"Be grim, wording {i}.", "neg": f"Be merry, wording {i}."} for i in range(2)],
        "questions": [f"What of {split} matter {i}?" for i in range(3)],
        "eval_prompt": "Is it grim? {question} {answer}",
        **fields,
    }


def write(root, name="grim", split="train", **fields):
    path = root / SPLIT_FOLDERS[split] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content(split, **fields)))
    return path


@pytest.fixture
def root(tmp_path):
    for split in SPLIT_FOLDERS:
        write(tmp_path, split=split)
    return tmp_path


def test_a_name_in_two_unicode_forms_is_one(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"  # macOS gives file names in the second form
    write(tmp_path, apart)
    write(tmp_path, composed, split="test")
    assert list_traits(tmp_path) == [composed]
    for source, name in (
        (tmp_path, composed),
        (tmp_path, apart),
        (tmp_path / "trait_data_extract" / f"{apart}.json", None),
    ):
        assert read_trait(source, name=name).name == read_trait(source, "test", name=name).name == composed
    write(tmp_path, composed)
    with pytest.raises(ValueError, match="are one name in two Unicode forms; rename one"):
        list_traits(tmp_path)


def test_half_an_emoji_is_named(tmp_path):
    path = write(tmp_path, questions=["What of \ud83d?"])
    with pytest.raises(ValueError, match=r"grim.json: questions\[0\] holds '\\ud83d' at character 9"):
        read_trait(path)


# ---------------------------------------------------------------- those that ship


def test_at_least_the_traits_people_ask_for_ship():
    assert {"sycophantic", "formal", "optimistic", "concise", "socratic"} <= set(list_traits())


@pytest.mark.parametrize("name", list_traits())
def test_shipped_traits_are_complete_and_differ(name):
    train, test = read_trait(name), read_trait(name, "test")
    assert len(train.questions) == len(test.questions) == 20  # disjoint: read_trait checks
    assert train.instructions == test.instructions and len(train.instructions) == 5
    assert len({text for pair in train.instructions for text in pair}) == 10
    assert train.eval_prompt == test.eval_prompt and "0 to 100" in train.eval_prompt
    assert not any(name.rstrip("ic") in question.lower() for question in train.questions + test.questions)


def test_no_question_serves_two_shipped_traits_in_different_splits():
    asked = {split: {q: n for n in list_traits() for q in read_trait(n, split).questions} for split in SPLIT_FOLDERS}
    assert not asked["train"].keys() & asked["test"].keys()


def test_judge_prompts_hold_their_placeholders():
    assert all(name in TRAIT_PROMPT for name in ("{trait}", "{question}", "{answer}"))
    assert all(name in COHERENCE_PROMPT for name in ("{question}", "{answer}")) and "{trait}" not in COHERENCE_PROMPT


# ---------------------------------------------------------------- sources


def test_every_way_to_name_a_trait_reads_the_same(root, tmp_path_factory):
    nested = tmp_path_factory.mktemp("nested")
    (nested / "data_generation").symlink_to(root)
    for split, folder in SPLIT_FOLDERS.items():
        expected = parse_trait(content(split), "grim", split, "here")
        for source in (root, str(root), nested, root / folder, root / folder / "grim.json"):
            assert read_trait(source, split) == read_trait(source, split, "grim") == expected
    assert list_traits(root) == ["grim"]


def test_one_of_several(root):
    write(root, "dry")
    assert read_trait(root, name="dry").name == "dry" and list_traits(root) == ["dry", "grim"]
    with pytest.raises(ValueError, match="holds several traits: dry, grim. Give the name"):
        read_trait(root)
    with pytest.raises(ValueError, match="holds no trait 'grimm'; there are: dry, grim"):
        read_trait(root, name="grimm")
    with pytest.raises(FileNotFoundError, match="has no test questions.*trait_data_eval/dry.json"):
        read_trait(root, "test", "dry")


def test_a_lone_file_has_no_test_questions(tmp_path):
    path = tmp_path / "grim.json"
    path.write_text(json.dumps(content()))
    assert len(read_trait(path).questions) == 3
    with pytest.raises(FileNotFoundError, match="no test questions"):
        read_trait(path, "test")


def test_names_that_ship_go_before_folders_of_that_name(root, monkeypatch):
    monkeypatch.chdir(root)
    (root / "formal").mkdir()
    assert read_trait("formal") == read_trait("formal", name="formal")
    for folder in ("./formal", Path("formal")):
        with pytest.raises(ValueError, match="formal holds no traits"):
            read_trait(folder)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file or folder 'sycophant'.*sycophantic"):
        read_trait("sycophant")
    with pytest.raises(ValueError, match="holds no traits; expected trait_data_extract and trait_data_eval"):
        read_trait(tmp_path)
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', got 'eval'"):
        read_trait("formal", "eval")
    (tmp_path / "grim.txt").write_text("grim")
    with pytest.raises(ValueError, match="A trait file is JSON"):
        read_trait(tmp_path / "grim.txt")


def test_hub_data_set(root, monkeypatch):
    asked = []
    there = ["README.md", "data.json", "trait_data_eval/grim.json", "nested/trait_data_extract/grim.json"]

    def download(repo_id, **settings):
        asked.append((repo_id, settings["repo_type"], settings["revision"]))
        assert list(filter_repo_objects(there, allow_patterns=settings["allow_patterns"])) == there[2:]
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_trait("someone/traits", "test", "grim", revision="v2") == read_trait(root, "test")
    assert asked == [("someone/traits", "dataset", "v2")]

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection and nothing cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="No folder 'someone/traits' here, and the Hub.*nothing cached"):
        read_trait("someone/traits")


# ---------------------------------------------------------------- malformed files


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"questions": []}, "questions must be a list with at least one entry, got \\[\\]"),
        ({"questions": None}, "questions must be a list"),
        ({"questions": ["a?", " "]}, "questions\\[1\\] must be text that is not empty, got ' '"),
        ({"questions": ["What now?", "Why?", "what  now"]}, "questions\\[2\\] says the same as questions\\[0\\]"),
        ({"instruction": []}, "instruction must be a list"),
        ({"instruction": ["Be grim."]}, "instruction\\[0\\] must be"),
        ({"instruction": [{"pos": "", "neg": "a"}]}, "instruction\\[0\\].pos must be text that is not empty, got ''"),
        ({"instruction": [{"pos": "a"}]}, "instruction\\[0\\].neg must be text that is not empty, got None"),
        ({"eval_prompt": "How grim is {answer}?"}, "eval_prompt lacks {question}"),
        ({"eval_prompt": "How grim?"}, "eval_prompt lacks {question} and {answer}"),
        ({"eval_prompt": None}, "eval_prompt must be text"),
    ],
)
def test_malformed_fields_are_named_with_their_file(tmp_path, fields, message):
    write(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"trait_data_extract/grim.json: {message}"):
        read_trait(tmp_path)


def test_malformed_files(tmp_path):
    path = write(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="grim.json is not JSON"):
        read_trait(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="grim.json must hold an object .* got list"):
        read_trait(tmp_path)


@pytest.mark.parametrize("split", SPLIT_FOLDERS)
def test_a_question_in_both_splits_is_refused_whichever_is_read(root, split):
    write(root, split="test", questions=["New?", "WHAT of train matter 1"])
    with pytest.raises(ValueError, match="trait_data_eval/grim.json: questions: 1 of the test questions .*matter 1"):
        read_trait(root, split)


# ---------------------------------------------------------------- prompt pairs


def test_pairs_are_instructions_times_questions(root):
    trait = read_trait(root)
    pairs = trait_pairs(trait)
    assert [pair.id for pair in pairs] == [f"grim/{i}/{q}" for i in range(2) for q in range(3)]
    last = pairs[-1]
    assert last.prompt == [{"role": "user", "content": "What of train matter 2?"}] and not last.negative
    assert last.steered_prompt == [{"role": "system", "content": "Be grim, wording 1."}, *last.prompt]
    assert last.metadata == {
        "split": "train",
        "instruction": "Be grim, wording 1.",
        "instruction_index": 1,
        "question": "What of train matter 2?",
        "question_index": 2,
    }


def test_negatives_and_placement(root):
    trait = replace(read_trait(root), questions=("Why?",))
    positives, negatives = trait_pairs(trait), trait_pairs(trait, "after", negative=True)
    assert [pair.id for pair in negatives] == ["grim/negative/0/0", "grim/negative/1/0"]
    assert all(pair.negative for pair in negatives)
    assert negatives[1].steered_prompt == [{"role": "user", "content": "Why?\n\nBe merry, wording 1."}]
    assert [pair.prompt for pair in positives] == [pair.prompt for pair in negatives]


# ---------------------------------------------------------------- drafting


def draft(**fields):
    return {
        "instruction": content()["instruction"] + [{"pos": f"Grim {i}.", "neg": f"Merry {i}."} for i in range(3)],
        "questions": [f"What about thing {i}?" for i in range(40)],
        "rubric": "Grim wording counts; sad facts do not.",
        **fields,
    }


class FakeChat:
    def __init__(self, *answers):
        self.answers, self.conversations = list(answers), []

    def __call__(self, messages):
        self.conversations.append(list(messages))
        return self.answers.pop(0)


def test_draft_is_a_trait_after_retries(tmp_path):
    chat = FakeChat("I'd rather not.", '{"questions": [', f"Here:\n```json\n{json.dumps(draft())}\n```\nEnjoy!")
    paths = draft_trait("grim", "speaks of doom", chat, tmp_path)
    assert "speaks of doom" in chat.conversations[0][0]["content"]
    assert "no JSON object" in chat.conversations[1][-1]["content"]
    assert [message["role"] for message in chat.conversations[2]] == ["user", "assistant", "user", "assistant", "user"]
    for split, path in paths.items():
        trait = read_trait(tmp_path, split)
        assert path == tmp_path / SPLIT_FOLDERS[split] / "grim.json" and json.loads(path.read_text())["note"] == NOTE
        assert (len(trait.instructions), len(trait.questions)) == (5, 20)
        assert "sad facts do not" in trait.eval_prompt and "{trait}" not in trait.eval_prompt
    assert sum(1 for path in tmp_path.rglob("*") if path.is_file()) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"questions": ["Why?"] * 40}, "questions\\[1\\] says the same"),
        ({"questions": [f"Q {i // 2}?" for i in range(40)]}, "20 of the test questions"),
        ({"questions": ["Why?"]}, "questions must be a list of 40, got 1"),
        ({"instruction": content()["instruction"]}, "instruction must be a list of 5 pairs, got 2"),
        ({"instruction": [{"pos": "a", "neg": ""}] * 5}, "instruction\\[0\\].neg must be text"),
        ({"rubric": "Look at {answer}."}, "rubric must be text without braces"),
    ],
)
def test_a_draft_that_can_not_be_used_writes_nothing(tmp_path, fields, message):
    answers = [json.dumps(draft(**fields))] * 2
    with pytest.raises(ValueError, match=f"(?s)No usable draft of 'grim' in 2 attempts.*{message}"):
        draft_trait("grim", "speaks of doom", FakeChat(*answers), tmp_path, attempts=2)
    assert not list(tmp_path.iterdir())


def test_drafting_asks_nothing_that_can_not_be_kept(tmp_path):
    chat = FakeChat()
    for name, description, settings, message in [
        ("Very grim", "doom", {}, "name must be small letters"),
        ("grim", " ", {}, "description must say"),
        ("grim", "doom", {"attempts": 0}, "attempts must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            draft_trait(name, description, chat, tmp_path, **settings)
    write(tmp_path, split="test")
    with pytest.raises(FileExistsError, match="trait_data_eval/grim.json exists"):
        draft_trait("grim", "doom", chat, tmp_path)
    assert not chat.conversations and not Path(tmp_path / SPLIT_FOLDERS["train"]).exists()
