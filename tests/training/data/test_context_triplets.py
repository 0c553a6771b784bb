"""scripts/: triplets of steering by context, and how the study of objectives picks a learning rate."""

import pytest
import study_objectives
import torch
from context_triplets import CHARACTERS, CONTEXTS, context_task, continuations, story_starts
from study_objectives import Study, Variant
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_psr.prompts.conversations import encode_prompt
from peft_psr.training import TripletCollator


TOKENS = 8


def story_tokenizer():
    """Letters and two longer tokens; as SentencePiece does, a blank belongs to the letters that follow it."""
    letters = sorted(set("▁.,'") | set("".join(story_starts("train") + list(CONTEXTS.values()))) - {" "})
    merges = [("i", "m"), ("T", "im"), ("i", "e"), ("Tim", "ie")]
    merges += [("▁", letter) for letter in letters if letter.isalpha()]
    vocabulary = ["<unk>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return story_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    path = tmp_path_factory.mktemp("stories")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def draw(folder, seed=0, **sizes):
    return context_task(
        folder, "snow", **{"train": 12, "validation": 5, "held_out": 6, **sizes}, max_new_tokens=TOKENS, seed=seed
    )


def test_starts_of_different_splits_share_no_character():
    characters = [character for split in CHARACTERS.values() for character in split]
    assert len(set(characters)) == len(characters)
    for split, own in CHARACTERS.items():
        starts = story_starts(split)
        assert len(set(starts)) == len(starts)
        for start in starts:
            assert any(character.lower() in start.lower() for character in own)
    assert not set(story_starts("train")) & set(story_starts("held_out"))


def test_triplets_of_a_context(folder, tokenizer):
    task = draw(folder)
    assert task.context == CONTEXTS["snow"]
    collator = TripletCollator(tokenizer, alpha=1.0)
    for split, size in (("train", 12), ("validation", 5), ("held_out", 6)):
        triplets = getattr(task, split)
        assert len(triplets) == size
        for triplet in triplets:
            assert triplet["prompt"] in story_starts(split)
            assert triplet["steered_prompt"] == f"{task.context} {triplet['prompt']}"
            row = collator.encode(triplet)  # raises where the branches can't be aligned
            assert row["input_ids"][row["prompt_length"] :] == row["teacher_input_ids"][-row["mask_length"] + 1 :]


def test_a_start_comes_again_only_after_all_others(folder):
    pool = story_starts("validation")
    starts = [triplet["prompt"] for triplet in draw(folder, train=1, validation=len(pool) // 2).validation]
    assert len(set(starts)) == len(starts)


def test_only_training_triplets_depend_on_the_seed(folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = draw(folder), draw(folder), draw(folder, seed=1)
    assert first == again
    assert first.train != other.train
    assert (first.validation, first.held_out) == (other.validation, other.held_out)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_continuation_is_what_the_model_wrote(model, tokenizer):
    prompts = ["The cat", "Once upon a time, Tim"] * 6
    torch.manual_seed(3)
    texts = continuations(model, tokenizer, prompts, 5, batch_size=1)
    assert any(text.startswith(" ") for text in texts)
    torch.manual_seed(3)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        for _ in range(5):  # one token at a time, without a cache
            probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(torch.multinomial(probabilities, 1).item())
            if ids[-1] == model.generation_config.eos_token_id:
                break
        pieces = [token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(ids[1:]) if token != "</s>"]
        assert f" {prompt}{text}" == "".join(piece for piece in pieces if piece not in ("<s>", "<unk>"))


def test_draws_that_merge_with_the_start_are_replaced(folder, tokenizer, monkeypatch):
    import context_triplets

    calls = []

    def write(model, tokenizer, prompts, max_new_tokens):
        calls.append(len(prompts))
        return ["ie was" if prompt.endswith("Tim") else " was" for prompt in prompts]

    monkeypatch.setattr(context_triplets, "continuations", write)
    monkeypatch.setattr(context_triplets, "story_starts", lambda split: ["Tim", "One day, Tim", "Lily"])
    task = draw(folder, train=4, validation=1, held_out=1)
    assert [triplet["prompt"] for triplet in task.train] == ["Lily"] * 4
    assert len(calls) > 3


@pytest.mark.parametrize("name", ["train", "validation", "held_out"])
def test_sizes_are_checked(folder, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        draw(folder, **{name: 0})


@pytest.mark.parametrize("best", [6.25e-4, 5e-3, 1e-2, 8e-2])
def test_the_learning_rate_is_bracketed_and_no_run_is_repeated(folder, tmp_path, monkeypatch, best):
    runs = []

    def run(self, variant, rate, seeds):
        done = self.results.setdefault(variant.key, {}).setdefault(repr(rate), {})
        for name in (f"{context}_{seed}" for context in self.contexts for seed in seeds):
            if name not in done:
                runs.append((rate, name))
                distance = abs(torch.tensor(rate / best).log2().item())
                done[name] = {"validation": 1 - distance / 10, "held_out": 0.5, "dead": 1}

    monkeypatch.setattr(Study, "run", run)
    study = Study(folder, ["snow", "dog"], [4, 5], tmp_path / "results.json")
    variant = Variant()
    study.tune(variant)
    assert study.best(variant) == pytest.approx(best)
    tried = study.scores(variant)
    assert min(tried) < best < max(tried)
    assert len(set(runs)) == len(runs) == 2 * len(tried) + 2  # the second seed at the best rate alone
    row = study.row(variant)
    assert f"{best:g} (tuned)" in row and row[-4:] == ["0.500 ± 0.000"] * 3 + ["4"]


def test_a_run_of_the_study_is_written_down_and_not_repeated(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study_objectives, "DRAWN", 8)
    monkeypatch.setattr(study_objectives, "TRIPLETS_FOR_START", 8)
    output = tmp_path / "results.json"
    variant = Variant("kl", "ridge", r=2, triplets=4, epochs=1, rate=1e-2)
    small = Study(folder, ["snow"], [0, 1], output)
    small.task = lambda context, seed: draw(folder, seed=seed)
    small.tune(variant)
    again = Study(folder, ["snow"], [0, 1], output)
    assert again.results == small.results
    result = again.results[variant.key]["0.01"]
    assert set(result) == {"snow_0", "snow_1"}
    assert result["snow_0"]["held_out"] <= 1.0 and result["snow_0"] != result["snow_1"]
    again.task = again.start = None  # nothing left to be run
    again.tune(variant)


def test_dead_gates_are_counted_for_each_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study_objectives, "DRAWN", 4)
    study = Study(folder, ["snow", "dog"], [0], tmp_path / "results.json")
    study.task = lambda context, seed: draw(folder, train=4, seed=seed)

    def start(fields, method, context, seed):
        weights = study._start(fields, method, context, seed)
        closed = "layers.1" if context == "dog" else "no layer"
        return {k: v - 1e3 if "gate_bias" in k and closed in k else v for k, v in weights.items()}

    study.start = start
    variant = Variant(r=1, triplets=4, epochs=1, rate=1e-2)
    study.run(variant, 1e-2, [0])
    assert {name: result["dead"] for name, result in study.results[variant.key]["0.01"].items()} == {
        "snow_0": 0,
        "dog_0": 1,
    }
