"""The ways a model is loaded, run, copied and trained, each with its plainest invariant.

Each test's docstring is its line in the table of modes in `docs/layouts.md` (`scripts/tabulate_layouts.py`).
`torch.compile` has a file of its own, `test_compile.py`.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers.adapters import steered
from helpers.models import ATTENTION, IDS, LAYERS, PROMPTS, cache_argument, generate, logits, tiny_model
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessor

from peft_psr import PSRConfig


LONG = torch.tensor([[1, *range(5, 30)], [1, *range(30, 55)]])


@pytest.fixture
def model():
    return steered(tiny_model())


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base_of_any_dtype(dtype, r):
    """float32, bfloat16 and float16 bases: weights stay float32, the edit is rounded once, to the base's dtype."""
    model = steered(tiny_model().to(dtype), r=r, alpha=0.7, positions="all").to(dtype)
    assert {p.dtype for n, p in model.named_parameters() if "psr_unit" in n} == {torch.float32}
    with torch.no_grad():
        model.psr_layers()[1].psr_unit["default"].gate_bias.fill_(10.0)  # every gate open
    target = model.get_base_model().model.layers[1]
    seen = {}
    target.register_forward_hook(lambda m, a, o: seen.update(before=o), prepend=True)
    target.register_forward_hook(lambda m, a, o: seen.update(after=o))
    assert logits(model).dtype == dtype
    unit = model.psr_layers()[1].psr_unit["default"].double()  # the unit refuses another dtype ...
    assert unit.direction.dtype == torch.float32
    w, b, z = (parameter.double() for parameter in (unit.gate_weight, unit.gate_bias, unit.direction))
    hidden = seen["before"].double()[ATTENTION.bool()]  # ... so that its parameters are taken one by one
    exact = hidden + 0.7 * torch.relu(hidden @ w.T + b) @ z
    assert (exact - hidden).abs().max() > 1.0
    half_a_unit = torch.finfo(dtype).eps / 2 * exact.abs()
    error = (seen["after"].double()[ATTENTION.bool()] - exact).abs()
    assert seen["after"].dtype == dtype and bool((error <= half_a_unit + 2e-5 * exact.abs().max()).all())


@pytest.mark.parametrize("where", ["cpu", "disk", "cpu and disk"])
def test_offloaded_base(where, tmp_path):
    """accelerate's CPU and disk offload, of the whole model or by a device map: logits and generation are equal."""
    model = steered(tiny_model())
    expected, tokens = logits(model), generate(model)
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif where == "disk":
        disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        layers = {f"base_model.model.model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
        rest = dict.fromkeys(["embed_tokens", "norm", "rotary_emb"], "cpu")
        device_map = {
            **{f"base_model.model.model.{name}": device for name, device in rest.items()},
            **layers,
            "base_model.model.lm_head": "cpu",
        }
        dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    offloaded = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert any("psr_unit" in name for name in offloaded)
    assert torch.equal(logits(model), expected) and torch.equal(generate(model), tokens)


def saved_base_and_adapter(folder):
    base = tiny_model()
    base.save_pretrained(folder / "base")
    model = steered(base, layers_to_transform=[0, 1])
    model.save_pretrained(folder / "adapter")
    return logits(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_loaded_onto_a_dispatched_base(low_cpu_mem_usage, tmp_path):
    """An adapter loaded onto a base with a device map: the two are dispatched again, logits are equal."""
    expected = saved_base_and_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    dispatch_model(base, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert model.get_base_model()._hf_hook is not None
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_adapter_loaded_onto_a_base_on_disk_is_refused(tmp_path, monkeypatch):
    """An adapter loaded onto edited layers that lie on disk: an error that says to load it first and offload then."""
    monkeypatch.chdir(tmp_path)  # PEFT copies the base's files into the working directory
    saved_base_and_adapter(tmp_path)
    memory = {"cpu": 40_000}  # bytes: about half of the model
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map="auto", max_memory=memory, offload_folder=tmp_path / "weights"
    )
    assert {"cpu", "disk"} == set(base.hf_device_map.values())
    with pytest.raises(ValueError, match="disk.*dispatch_model"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", max_memory=memory, offload_folder=tmp_path / "more")


def test_meta_device_loading(model, tmp_path):
    """`low_cpu_mem_usage=True`: units are made on the meta device and hold the file's weights once loaded."""
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(tiny_model(), PSRConfig(), low_cpu_mem_usage=True)
    assert all(parameter.is_meta for name, parameter in fresh.named_parameters() if "psr_unit" in name)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=True).eval()
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for name in ("default", "second"):
        loaded.set_adapter(name)
        for layer, original in zip(loaded.psr_layers().values(), model.psr_layers().values(), strict=True):
            pairs = zip(layer.unit(name).parameters(), original.unit("default").parameters(), strict=True)
            assert all(torch.equal(got, saved) for got, saved in pairs)
        # the file's tensors lie in memory as the file has them: unaligned, and other kernels sum them up
        torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("layout", ["llama", "gemma"])
def test_cache_implementations(layout):
    """Static and sliding caches, prompts longer than Gemma's window: the tokens of a dynamic cache and of none."""
    model = steered(tiny_model(layout))
    mask = torch.ones_like(LONG)
    expected = generate(model, LONG, mask, use_cache=False, max_new_tokens=12)
    assert torch.equal(generate(model, LONG, mask, max_new_tokens=12), expected)
    assert torch.equal(generate(model, LONG, mask, max_new_tokens=12, cache_implementation="static"), expected)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_chunked_prefill(model, chunk):
    """`prefill_chunk_size`: the prompt in pieces, of one token too, gives the tokens of the prompt in one piece."""
    mask = torch.zeros_like(LONG)
    mask[:, 10:15] = mask[:, -1] = 1
    for more in ({}, {"steering_mask": mask}):
        expected = generate(model, LONG, torch.ones_like(LONG), **more)
        assert torch.equal(generate(model, LONG, torch.ones_like(LONG), prefill_chunk_size=chunk, **more), expected)


@pytest.mark.parametrize("layout", ["llama", "gemma"])
def test_beams_and_return_sequences(layout):
    """Beam search and several return sequences: each row as if it were alone, cached or not."""
    model = steered(tiny_model(layout))
    settings = {"num_beams": 3, "num_return_sequences": 2}
    masks = torch.zeros_like(LONG)
    masks[0, 2:20] = masks[1, -1] = 1
    steering = {"alpha": [0.5, 2.0], "steering_mask": masks}
    together = generate(model, LONG, torch.ones_like(LONG), **steering, **settings)
    for row, alpha in enumerate([0.5, 2.0]):
        one = slice(row, row + 1)
        steering_alone = {"alpha": alpha, "steering_mask": masks[one]}
        alone = generate(model, LONG[one], torch.ones_like(LONG[one]), **steering_alone, **settings)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
    uncached = generate(model, LONG, torch.ones_like(LONG), use_cache=False, **steering, **settings)
    assert torch.equal(uncached, together)


def test_sampled_return_sequences(model):
    """Sampling several sequences a prompt: the same random numbers give the same tokens as repeated prompts."""
    sampling = {"do_sample": True, "temperature": 0.7}
    torch.manual_seed(5)
    together = generate(model, num_return_sequences=3, alpha=[0.2, 1.0, 2.0], **sampling)
    torch.manual_seed(5)
    rows, mask = IDS.repeat_interleave(3, 0), ATTENTION.repeat_interleave(3, 0)
    repeated = generate(model, rows, mask, alpha=[0.2] * 3 + [1.0] * 3 + [2.0] * 3, **sampling)
    assert torch.equal(together, repeated)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_decoding(model, how):
    """Assisted decoding (prompt lookup, a small assistant model): the tokens of plain greedy search."""
    ids = torch.tensor([[1, 9, 12, 17, 9, 12, 17, 9, 12]])
    mask = torch.zeros_like(ids)
    mask[:, 3:] = 1
    more = {"prompt_lookup_num_tokens": 2} if how == "prompt lookup" else {"assistant_model": tiny_model(seed=0)}
    settings = {"max_new_tokens": 16, "eos_token_id": 63}  # transformers 5.3 looks up no prompt without an end token
    for steering in ({}, {"steering_mask": mask}):
        expected = generate(model, ids, torch.ones_like(ids), **settings, **steering)
        assert expected.shape[1] == ids.shape[1] + 16
        got = generate(model, ids, torch.ones_like(ids), **settings, **steering, **more)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "gemma"])
def test_hidden_states_are_edited(layout):
    """`output_hidden_states=True` shows the edited stream after every layer, the last one after the final norm."""
    base = tiny_model(layout)
    base(input_ids=IDS, output_hidden_states=True)  # transformers leaves hooks of its own behind, before ours
    model = steered(base, gate="constant")
    decoder, layers = base.get_decoder(), [base.get_submodule(unit.name) for unit in model.psr_layers().values()]
    edited = []
    for layer in layers:
        layer.register_forward_hook(lambda m, a, o: edited.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        states = model(input_ids=IDS, attention_mask=ATTENTION, output_hidden_states=True).hidden_states
        final_norm = decoder.ln_f if layout == "gpt2" else decoder.norm
        assert len(states) == LAYERS + 1
        for state, expected in zip(states[1:], [*edited[:-1], final_norm(edited[-1])], strict=True):
            assert torch.equal(state, expected)
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=IDS, attention_mask=ATTENTION, output_hidden_states=True).hidden_states
    assert all(not torch.equal(a[:, -1], b[:, -1]) for a, b in zip(states[1:], plain[1:], strict=True))


def test_continued_cache(model):
    """A conversation kept in one cache, turn after turn, gives the tokens of the turn's whole prompt, without one."""
    first = torch.tensor([PROMPTS[0]])
    cache = DynamicCache(config=model.get_base_model().config)
    answer = generate(model, first, torch.ones_like(first), **cache_argument(model, cache), use_cache=True)
    second = torch.cat([answer, torch.tensor([[33, 21, 8]])], dim=1)
    # the earlier answer was edited when it was generated; its last token was never fed back, and counts as prompt
    edited = [0] * (first.shape[1] - 1) + [1] * (answer.shape[1] - first.shape[1]) + [0] * 3 + [1]
    uncached = generate(model, second, torch.ones_like(second), steering_mask=torch.tensor([edited]), use_cache=False)
    assert torch.equal(generate(model, second, torch.ones_like(second), **cache_argument(model, cache)), uncached)


def test_early_exit_decoding():
    """Early-exit decoding, a `generate` inside a `generate`: the tokens of plain greedy search."""
    model = steered(tiny_model())
    mask = torch.ones_like(LONG[:1])
    expected = generate(model, LONG[:1], mask, max_new_tokens=8)
    assert torch.equal(generate(model, LONG[:1], mask, max_new_tokens=8, assistant_early_exit=2), expected)


def test_another_call_inside_generate():
    """A logits processor that calls the model, cached or not, leaves the tokens of `generate` as they are."""
    model = steered(tiny_model())
    mask = torch.ones_like(LONG)
    expected = generate(model, LONG, mask, max_new_tokens=8)

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model(input_ids=input_ids[:, :3])
            return scores

    for use_cache in (True, False):
        settings = {"max_new_tokens": 8, "use_cache": use_cache, "logits_processor": [Calls()]}
        assert torch.equal(generate(model, LONG, mask, **settings), expected)


def test_guidance_is_refused():
    """`guidance_scale`, which runs a second prompt through the model, is refused, however it is given."""
    model = steered(tiny_model())
    for settings in ({"guidance_scale": 1.5}, {"generation_config": GenerationConfig(guidance_scale=1.5)}):
        with pytest.raises(ValueError, match="guidance_scale runs a second prompt"):
            model.generate(input_ids=LONG, **settings)
