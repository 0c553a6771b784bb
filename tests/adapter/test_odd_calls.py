"""Calls that are easy to get wrong without a word: each is steered as it should be, or refused."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.adapters import randomize, steered
from helpers.models import PROMPTS, cache_argument, tiny_model
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LogitsProcessor,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_psr import PSRConfig


IDS = torch.tensor([[1, 9, 12, 17, 23, 31], [1, 40, 8, 22, 5, 6], [1, 22, 35, 19, 7, 30]])
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def greedy(model, ids, **settings):
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, **settings)


def test_threads_take_turns():
    model = steered(tiny_model())
    expected = [greedy(model, IDS[i : i + 1]) for i in range(3)]
    logits = [model(IDS[i : i + 1], alpha=0.5 * i).logits for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            answers = list(pool.map(lambda i: greedy(model, IDS[i : i + 1]), range(3)))
            for ours, alone in zip(answers, expected, strict=True):
                assert torch.equal(ours, alone)
            called = list(pool.map(lambda i: model(IDS[i : i + 1], alpha=0.5 * i).logits, range(3)))
            for ours, alone in zip(called, logits, strict=True):
                torch.testing.assert_close(ours, alone)


def test_a_copy_has_a_lock_of_its_own():
    model = steered(tiny_model())
    other = copy.deepcopy(model)
    assert other.get_base_model()._psr_state.lock is not model.get_base_model()._psr_state.lock
    assert torch.equal(greedy(other, IDS), greedy(model, IDS))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_logits_processor_may_call_the_model(use_cache):
    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(model.get_base_model()(input_ids=IDS).logits)
            return scores

    model, seen = steered(tiny_model()), []
    alone, answer = model(IDS).logits, greedy(model, IDS[:1])
    with_calls = greedy(model, IDS[:1], logits_processor=[Calls()], use_cache=use_cache)
    assert torch.equal(with_calls, answer)
    if use_cache:  # else a call can't be told from a step
        assert len(seen) == 5
        for logits in seen:
            torch.testing.assert_close(logits, alone)


def test_generation_from_nothing_agrees_with_and_without_cache():
    model = steered(tiny_model())
    cached, anew = (model.generate(**GREEDY, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, anew)


def test_a_static_cache_by_hand_edits_the_same_tokens():
    model = steered(tiny_model())
    expected = model(IDS).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    mask = nn.functional.pad(torch.ones_like(IDS), (0, 10))
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=mask, **cache_argument(model, cache)).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_continuous_batching_is_refused_where_it_would_be_wrong():
    settings = GenerationConfig(**GREEDY)
    model = steered(tiny_model())
    with pytest.raises(NotImplementedError, match="positions='all'"):
        model.generate_batch(inputs=[PROMPTS[0]], generation_config=settings)
    assert not {"init_continuous_batching", "_load_pretrained_model", "generate"} & set(vars(model.unload()))


def test_sequence_labels_are_no_tokens():
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, num_labels=2,
        )
    )  # fmt: skip
    model = steered(base, task_type="SEQ_CLS")
    with_labels = model(input_ids=IDS, labels=torch.tensor([0, 1, 1]))
    assert torch.equal(with_labels.logits, model(input_ids=IDS).logits)
    with_labels.loss.backward()
    assert model.psr_layers()[0].unit("default").direction.grad.any()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "2 names and 3 rows"),
        (["a"], "1 names and 3 rows"),
        ([], "one adapter's name for each row"),
        ([None, "a", "b"], "one adapter's name for each row"),
    ],
)
def test_names_that_do_not_fit_the_rows(names, message):
    model = steered(tiny_model(), adapter_name="a")
    model.add_adapter("b", PSRConfig())
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, adapter_names=names)
    model(input_ids=IDS, adapter_names=["a", "b", "__base__"])
    with pytest.raises(TypeError, match="adapter_names is for a PeftModel"):
        model.get_base_model()(input_ids=IDS, adapter_names=["a", "b", "b"])


def test_mistakes_that_used_to_pass():
    model = steered(tiny_model(), adapter_name="a")
    with pytest.raises(ValueError, match="No adapter 'typo'; there are: a"):
        model.base_model.set_adapter(["a", "typo"])
    assert model.active_adapters == ["a"]
    with pytest.raises(ValueError, match="can't be merged"):
        model.unmerge_adapter()
    for name in ("__base__", "*"):
        with pytest.raises(ValueError, match="has a meaning of its own"):
            model.add_adapter(name, PSRConfig())
    with pytest.raises(ValueError, match="steering_mask must be 0 or 1"):
        model(input_ids=IDS, steering_mask=torch.full(IDS.shape, 0.5))
    assert torch.equal(
        model(input_ids=IDS, steering_mask=torch.ones(IDS.shape)).logits,
        model(input_ids=IDS, steering_mask=torch.ones_like(IDS)).logits,
    )


@pytest.mark.parametrize("targets", [["wo"], r"encoder\.block\.\d+"])
def test_the_encoder_is_not_edited(targets):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="lies in the encoder of T5ForConditionalGeneration"):
        get_peft_model(model, PSRConfig(target_modules=targets))
    assert list(model.state_dict()) == before
    get_peft_model(model, PSRConfig(target_modules=r".*decoder.*wo"))


@pytest.mark.parametrize("weight", ["gate_weight", "direction"])
@pytest.mark.parametrize("change", [lambda m, n: prune.l1_unstructured(m, n, 0.5), parametrizations.weight_norm])
def test_weights_may_be_pruned_or_parametrised(weight, change):
    model, same = (steered(tiny_model()) for _ in range(2))
    for layer, plain in zip(model.psr_layers().values(), same.psr_layers().values(), strict=True):
        change(layer.unit("default"), weight)
        with torch.no_grad():
            getattr(plain.unit("default"), weight).copy_(getattr(layer.unit("default"), weight))
    torch.testing.assert_close(model(IDS).logits, same(IDS).logits)


class Chain(nn.Module):
    """Linear layers, each checkpointed or not, the later ones under autocast or not."""

    def __init__(self, autocast=False, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.autocast, self.checkpointed = autocast, checkpointed

    def forward(self, stream):
        for i, layer in enumerate(self.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast and i > 0):
                if self.checkpointed:
                    stream = checkpoint(layer, stream, use_reentrant=False)
                else:
                    stream = layer(stream)
        return stream


def chain(**settings):
    model = get_peft_model(Chain(**settings), PSRConfig(target_modules=["layers.0", "layers.1", "layers.2"]))
    randomize(model)
    return model


def test_rows_of_tokens_may_be_checkpointed():
    gradients = []
    for checkpointed in (False, True):
        model = chain(checkpointed=checkpointed)
        model(torch.ones(4, 8, requires_grad=True)).sum().backward()
        gradients.append([layer.unit("default").direction.grad for layer in model.psr_layers().values()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_of_some_layers_does_not_reach_the_edit():
    model = chain(autocast=True)
    stream = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, base = model(stream), model.get_base_model()
        for i, layer in enumerate(base.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=i > 0):
                stream = nn.functional.linear(stream, layer.weight, layer.bias)
            unit = layer.psr.unit("default")
            gates = (stream.float() @ unit.gate_weight.T + unit.gate_bias).relu()
            stream = (stream.float() + gates @ unit.direction).to(stream.dtype)
    torch.testing.assert_close(got, stream, atol=1e-6, rtol=1e-6)


@pytest.mark.long
def test_layers_compiled_by_themselves_follow_every_strength():
    torch._dynamo.reset()
    model = steered(tiny_model())
    expected = {}
    with torch.no_grad():
        for alpha in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5):
            model.set_alpha(alpha)
            expected[alpha] = model(IDS[:, :1]).logits
        for layer in model.get_base_model().model.layers:
            layer.compile(backend="eager", fullgraph=True)
        for alpha, logits in expected.items():
            model.set_alpha(alpha)
            torch.testing.assert_close(model(IDS[:, :1]).logits, logits)
