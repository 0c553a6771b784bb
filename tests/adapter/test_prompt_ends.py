"""Forward calls that take their text for a prompt and edit its last token: a mistake, or the end of a prefix."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers.adapters import steered_model
from helpers.models import tiny_model
from helpers.tokenizers import tiny_tokenizer
from peft import get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from peft_psr import PSRConfig, PSRWarning
from peft_psr.positions import response_mask


IDS = torch.tensor([[1, 9, 12, 17, 23, 31, 8, 44]])
LABELS = torch.tensor([[-100] * 4 + [23, 31, 8, 44]])
PREFIX = 5
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


# ---------------------------------------------------------------- gradients without labels


class WithMask(DataCollatorForSeq2Seq):
    """The recipe of the documentation."""

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        return {**batch, "steering_mask": response_mask(batch["labels"])}


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def train(folder, collator, func=None, **settings):
    """How far the directions come in four steps."""
    model = get_peft_model(tiny_model(), PSRConfig())
    rows = [{"input_ids": IDS[0].tolist(), "labels": LABELS[0].tolist(), "attention_mask": [1] * 8}] * 8
    arguments = TrainingArguments(
        str(folder), max_steps=4, learning_rate=0.1, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    made = Trainer(model, arguments, data_collator=collator, train_dataset=rows, compute_loss_func=func)
    made.train()
    return max(layer.unit("default").direction.abs().max().item() for layer in model.psr_layers().values())


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"func": own_loss}])
def test_a_trainer_that_takes_the_labels_off(tmp_path, settings):
    with pytest.warns(PSRWarning, match="neither `labels` nor a `steering_mask`") as seen:
        assert train(tmp_path, DataCollatorForSeq2Seq(tiny_tokenizer()), **settings) == 0
    assert len([warning for warning in seen if warning.category is PSRWarning]) == 1
    assert train(tmp_path, WithMask(tiny_tokenizer()), **settings) > 0.05


def test_calls_of_the_decoder_alone_are_looked_at_too():
    hidden = steered_model().get_base_model().model(input_ids=IDS).last_hidden_state
    with pytest.warns(PSRWarning, match="PSRTrainer"):
        hidden[:, :-1].sum().backward()


@pytest.mark.parametrize("positions", ["response", "question_and_response", "all"])
def test_right_calls_do_not_warn(positions):
    model = steered_model(positions=positions).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSRWarning)
        for arguments in ({"labels": LABELS}, {"steering_mask": torch.ones_like(IDS)}):
            model(IDS, **arguments).logits.sum().backward()
        model(IDS[:, :1]).logits.sum().backward()
        model.generate(IDS, **GREEDY)
        model(IDS).logits[:, -1].argmax()
        if positions != "response":
            model(IDS).logits.sum().backward()
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)  # something else is trained over it
        model(IDS).logits.sum().backward()


def test_other_heads_on_the_last_token_are_trained_as_ever():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = get_peft_model(LlamaForSequenceClassification(config), PSRConfig(task_type="SEQ_CLS"))
    model(IDS).logits.sum().backward()
    assert model.psr_layers()[0].unit("default").direction.grad.any()
    model = get_peft_model(tiny_model(), PSRConfig())
    model(IDS).logits[:, -1].sum().backward()
    assert model.psr_layers()[0].unit("default").direction.grad.any()


# ---------------------------------------------------------------- prefixes


def answer(model, ids=IDS, **settings):
    more = {"attention_mask": torch.ones_like(ids), **GREEDY, **settings}
    return torch.stack(model.generate(ids, return_dict_in_generate=True, output_scores=True, **more).scores)


def filled(model, how="given", ids=IDS[:, :PREFIX], **settings):
    cache = {"given": DynamicCache(config=model.config), "made": None}.get(how)
    with torch.no_grad():
        if how == "decoder":
            return model.get_base_model().model(ids, use_cache=True, **settings).past_key_values
        return model(ids, past_key_values=cache, use_cache=True, **settings).past_key_values


def prefixed():
    """A model whose edit of a prefix's last token shows far from it."""
    model = steered_model()
    with torch.no_grad():
        for layer in model.psr_layers().values():
            layer.unit("default").direction.mul_(6.0)
    return model


@pytest.mark.parametrize("how", ["given", "made", "decoder"])
@pytest.mark.parametrize("length", [1, PREFIX, 7])
def test_generate_goes_on_from_a_prefix(how, length):
    model = prefixed()
    cache = filled(model, how, IDS[:, :length])
    for _ in range(2):
        torch.testing.assert_close(answer(model, past_key_values=copy.deepcopy(cache)), answer(model))
    mask = torch.zeros_like(IDS)
    mask[:, -2:] = 1
    given = answer(model, past_key_values=cache, steering_mask=mask)
    torch.testing.assert_close(given, answer(model, steering_mask=mask))


@pytest.mark.parametrize("layout", ["gpt2", "gemma"])
def test_prefixes_of_other_layouts(layout):
    model = get_peft_model(tiny_model(layout), PSRConfig(init_weights=False)).eval()
    torch.testing.assert_close(answer(model, past_key_values=filled(model)), answer(model), atol=1e-4, rtol=1e-4)


def test_beams_and_rows_go_on_from_a_prefix():
    model, ids = prefixed(), torch.cat([IDS, IDS.flip(1)])
    ids[:, :PREFIX] = IDS[:, :PREFIX]
    cache = filled(model, ids=ids[:, :PREFIX])
    cache.batch_repeat_interleave(2)  # transformers leaves that to its caller
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, **GREEDY)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, past_key_values=cache, **GREEDY)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("how", ["given", "made"])
def test_a_loop_by_hand_edits_the_end_of_its_prompt(how):
    model = prefixed()
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    cache, ids, step = DynamicCache(config=model.config) if how == "given" else None, IDS, IDS
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            output = model(step, past_key_values=cache, use_cache=True)
            cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], dim=1)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("explicit", [{"alpha": 0.0}, {"steering_mask": torch.zeros(1, PREFIX)}])
def test_caches_that_keep_their_last_token(explicit):
    model = prefixed()
    with torch.no_grad():
        parts = [model(IDS[:, :PREFIX], use_cache=True, **explicit).past_key_values for _ in range(3)]
        fixed = StaticCache(config=model.config, max_cache_len=32)
        model(IDS[:, :PREFIX], past_key_values=fixed, **explicit)
    rest = {"ids": IDS[:, PREFIX:], "attention_mask": torch.ones_like(IDS)}
    torch.testing.assert_close(answer(model, past_key_values=parts[0], **rest), answer(model))
    torch.testing.assert_close(answer(model, past_key_values=fixed), answer(model), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        last = model(IDS[:, PREFIX:], past_key_values=parts[1]).logits[:, -1]
        torch.testing.assert_close(last, model(IDS).logits[:, -1])


@pytest.mark.parametrize("case", ["new tokens alone", "fixed size", "chunks"])
def test_what_can_not_be_computed_again_is_said(case):
    model = prefixed()
    if case == "fixed size":
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(IDS[:, :PREFIX], past_key_values=cache)
    else:
        cache = filled(model)
    with pytest.warns(PSRWarning, match=r"alpha=0\.0"):
        if case == "chunks":
            with torch.no_grad():
                model(IDS[:, PREFIX:], past_key_values=cache)
        elif case == "fixed size":
            answer(model, past_key_values=cache)
        else:
            answer(model, IDS[:, PREFIX:], past_key_values=cache, attention_mask=torch.ones_like(IDS))


@pytest.mark.parametrize("given", ["steering_mask", "labels"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_scored_text_behind_a_prefix(given, goes_on):
    """A prefix ends in an edited token: rightly so where the response follows it, but not where the prompt goes on."""
    model = prefixed()
    rest, labels = IDS[:, PREFIX:], IDS.clone()
    labels[:, : PREFIX + (0 if goes_on else 2)] = -100
    wanted = (
        {"labels": labels[:, PREFIX:]} if given == "labels" else {"steering_mask": response_mask(labels)[:, PREFIX:]}
    )
    cache = filled(model)
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always", PSRWarning)
        logits = model(rest, past_key_values=cache, **wanted).logits
    right = torch.allclose(logits, model(IDS, steering_mask=response_mask(labels)).logits[:, PREFIX:], atol=1e-4)
    assert right is goes_on and any(warning.category is PSRWarning for warning in seen) is not goes_on


@pytest.mark.parametrize("off", ["disable_adapter", "unedited"])
def test_a_prefix_of_the_base_model_has_no_edited_end(off):
    model = prefixed()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", PSRWarning)
        with getattr(model, off)():
            for token in (IDS[:, :3], IDS[:, 3:PREFIX]):
                model(token, past_key_values=cache)
        torch.testing.assert_close(answer(model, past_key_values=cache), answer(model), atol=1e-4, rtol=1e-4)


def test_positions_without_an_end_need_nothing():
    model = steered_model(positions="all")
    cache = filled(model)
    assert cache.get_seq_length() == PREFIX
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSRWarning)
        scores = answer(model, IDS[:, PREFIX:], past_key_values=cache, attention_mask=torch.ones_like(IDS))
    torch.testing.assert_close(scores, answer(model))


# ---------------------------------------------------------------- scoring


def test_a_text_is_scored_as_it_is_generated():
    """The recipe of the documentation: a mask from the token before the continuation on."""
    model = steered_model()
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    ids, start = out.sequences, IDS.shape[1]
    mask = torch.zeros_like(ids)
    mask[:, start - 1 :] = 1
    with torch.no_grad():
        logits = model(input_ids=ids, steering_mask=mask).logits[:, start - 1 : -1]
        plain = model(input_ids=ids).logits[:, start - 1 : -1]
        base = tiny_model()(input_ids=ids).logits[:, start - 1 : -1]
    torch.testing.assert_close(logits, torch.stack(out.scores, dim=1), atol=1e-4, rtol=1e-4)
    assert torch.equal(plain, base)
