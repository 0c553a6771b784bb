"""Names of other packages that are private to them, or fragile, and that this package needs.

A test that fails here names the place in our code to look at. What is public and documented is not listed.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.models import tiny_model
from helpers.paths import ROOT
from huggingface_hub.errors import HfHubHTTPError
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from peft_psr import PSRConfig, PSRModel
from peft_psr.hooks import SteeredBatching, SteeredGenerate
from peft_psr.layer import PSRLayer
from peft_psr.training import PSRTrainer
from peft_psr.unit import PSRUnit


@dataclass(frozen=True)
class Need:
    """A name and how it is called.

    Attributes:
        name: "module:attribute.attribute".
        where: Our file that needs it.
        given: Arguments that we pass by name, or read in place of the caller.
    """

    name: str
    where: str
    given: tuple[str, ...] = ()


TUNER = "peft.tuners.tuners_utils"
NEEDS = [
    Need("peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING", "peft_psr/registration.py"),
    Need("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING", "peft_psr/registration.py"),
    Need("peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING", "peft_psr/registration.py"),
    Need(f"{TUNER}:check_target_module_exists", "peft_psr/model.py", ("config", "key")),
    Need(f"{TUNER}:BaseTuner.active_adapters", "peft_psr/model.py"),
    Need(f"{TUNER}:BaseTuner.delete_adapter", "peft_psr/model.py", ("adapter_name",)),
    Need(f"{TUNER}:BaseTunerLayer._move_adapter_to_device_of_base_layer", "peft_psr/layer.py", ("adapter_name",)),
    Need(f"{TUNER}:BaseTunerLayer.active_adapters", "peft_psr/layer.py"),
    Need("peft:PeftModel._enable_peft_forward_hooks", "peft_psr/model.py"),
    Need("peft.utils.other:AuxiliaryTrainingWrapper", "peft_psr/model.py"),
    Need(
        "peft.utils.other:AuxiliaryTrainingWrapper.unload_and_optionally_merge_module",
        "peft_psr/model.py",
        ("merge", "safe_merge", "adapter_names"),
    ),
    Need("peft.utils:load_peft_weights", "peft_psr/hub/saved_adapters.py", ("device",)),
    Need("peft.tuners.lora:LoraLayer.set_scale", "evaluation/measures/strength.py", ("adapter", "scale")),
    Need("transformers:Trainer._save", "training/trainer/trainer.py", ("output_dir", "state_dict")),
    Need("transformers:Trainer._prepare_inputs", "training/trainer/trainer.py", ("inputs",)),
    Need(
        "transformers.trainer_pt_utils:get_length_grouped_indices",
        "training/trainer/length_grouping.py",
        ("lengths", "batch_size", "generator"),
    ),
    Need("transformers:GenerationMixin.init_continuous_batching", "peft_psr/hooks.py"),
    Need("transformers:PreTrainedModel.get_decoder", "peft_psr/hooks.py"),
    Need("transformers:PreTrainedModel.get_encoder", "peft_psr/model.py"),
    Need("transformers:PreTrainedConfig.get_text_config", "peft_psr/base_model/decoder.py", ("decoder",)),
    Need("transformers:PreTrainedModel._load_pretrained_model", "peft_psr/base_model/fit.py"),
    Need("transformers.cache_utils:Cache.get_seq_length", "peft_psr/base_model/caches.py"),
    Need("transformers.cache_utils:Cache.crop", "peft_psr/base_model/caches.py"),
    Need("transformers.cache_utils:DynamicLayer", "peft_psr/base_model/caches.py"),
    Need("transformers.cache_utils:DynamicSlidingWindowLayer", "peft_psr/base_model/caches.py"),
    Need("transformers.utils:find_adapter_config_file", "peft_psr/base_model/loading.py", ("revision",)),
    Need(
        "transformers:PreTrainedTokenizerBase.apply_chat_template",
        "peft_psr/prompts/rendering.py",
        ("tokenize", "add_generation_prompt", "continue_final_message"),
    ),
    Need("huggingface_hub:try_to_load_from_cache", "peft_psr/base_model/loading.py", ("revision",)),
    Need("accelerate.utils:DynamoBackend.NO", "training/trainer/trainer.py"),
    Need("accelerate.utils.memory:clear_device_cache", "training/sampling/local.py"),
    Need("accelerate.utils.memory:should_reduce_batch_size", "training/sampling/local.py", ("exception",)),
    Need("torch.distributed.tensor:DTensor", "training/trainer/trainer.py"),
    Need("torch:from_file", "training/passes/activation_cache.py"),
    Need("torch:compiler.is_compiling", "peft_psr/layer.py"),
    Need("torch:compiler.cudagraph_mark_step_begin", "benchmarks/variants.py"),
    Need("torch._dynamo.config:cache_size_limit", "training/passes/compiled.py"),
]
HARNESS_NEEDS = [
    Need("lm_eval:simple_evaluate", "evaluation/measures/capability.py", ("model", "tasks", "limit", "task_manager",
         "apply_chat_template", "system_instruction", "log_samples")),
    Need("lm_eval.tasks:TaskManager.__init__", "evaluation/measures/capability.py", ("include_path",)),
    Need("lm_eval.models.huggingface:HFLM.__init__", "evaluation/measures/capability.py",
         ("pretrained", "tokenizer", "batch_size")),
    Need("lm_eval.models.huggingface:HFLM._loglikelihood_tokens", "evaluation/measures/capability.py",
         ("requests", "disable_tqdm", "override_bs")),
    Need("lm_eval.models.huggingface:HFLM.max_length", "evaluation/measures/capability.py"),
    Need("lm_eval.models.huggingface:HFLM.model", "evaluation/measures/capability.py"),
    Need("lm_eval.models.huggingface:HFLM.batch_size", "evaluation/measures/capability.py"),
    Need("lm_eval.api.model:CacheHook.add_partial", "evaluation/measures/capability.py"),
    Need("lm_eval.tasks.ifeval.instructions_registry:INSTRUCTION_DICT", "training/judges/ifeval.py"),
    Need("lm_eval.tasks.ifeval.utils:InputExample", "training/judges/ifeval.py",
         ("key", "instruction_id_list", "prompt", "kwargs")),
    Need("lm_eval.tasks.ifeval.utils:test_instruction_following_loose", "training/judges/ifeval.py",
         ("inp", "response")),
]  # fmt: skip

OVERRIDDEN: dict[tuple[type, type], tuple[str, ...]] = {
    (PSRModel, BaseTuner): (
        "_prepare_adapter_config",
        "_prepare_model",
        "_check_target_module_exists",
        "_create_and_replace",
        "inject_adapter",
        "_get_adapter_state_dict",
        "_cast_adapter_dtype",
        "set_adapter",
        "unmerge_adapter",
        "_check_merge_allowed",
        "_unload_and_optionally_merge",
        "_enable_adapter_layers",
        "_remap_adapter_state_dict_for_load",
    ),
    (PSRLayer, BaseTunerLayer): ("_get_base_layer_device_and_dtype", "set_adapter", "set_requires_grad"),
    (PSRUnit, nn.Module): ("_apply", "_load_from_state_dict"),
    (PSRTrainer, Trainer): (
        "compute_loss",
        "prediction_step",
        "evaluation_loop",
        "evaluate",
        "get_batch_samples",
        "save_model",
        "_load_from_checkpoint",
        "_load_best_model",
        "_clip_grad_norm",
        "_get_train_sampler",
        "log",
        "train",
    ),
}
"""(our class, theirs): what theirs is to call and find ours."""

CASES = [(ours, theirs, name) for (ours, theirs), names in OVERRIDDEN.items() for name in names]


def look_up(need: Need) -> Any:
    module, _, path = need.name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{need.where} needs {need.name}, which this version does not have: {error}")
    return found


def check(need: Need) -> None:
    found = look_up(need)
    assert (ROOT / need.where).is_file()
    if need.given:
        missing = set(need.given) - set(inspect.signature(found).parameters)
        assert not missing, f"{need.where} gives {need.name} arguments that it does not take: {sorted(missing)}"


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: need.name)
def test_the_name_exists_and_takes_what_we_give(need):
    check(need)


@pytest.mark.parametrize("need", HARNESS_NEEDS, ids=lambda need: need.name)
def test_the_name_of_the_harness_exists_and_takes_what_we_give(need, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("langdetect")  # of the checkers of IFEval
    monkeypatch.setenv("LOCAL_RANK", "1")  # rank 0 downloads data of NLTK
    check(need)


@pytest.mark.parametrize(("ours", "theirs", "name"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_what_we_override_takes_what_theirs_takes(ours, theirs, name):
    where = f"{ours.__module__}.{ours.__name__}.{name}"
    assert hasattr(theirs, name), f"{where} overrides nothing: {theirs.__name__} has no {name} any more"
    assert name in vars(ours), f"{where} is gone; take it out of this table"
    mine, wanted = (inspect.signature(getattr(owner, name)).parameters for owner in (ours, theirs))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values()):
        return
    missing = [key for key in wanted if key not in mine]
    assert not missing, f"{where} does not take what {theirs.__name__}.{name} takes: {missing}"


def test_every_override_of_a_private_name_is_listed():
    for (ours, theirs), names in OVERRIDDEN.items():
        private = {n for n in vars(ours) if n in dir(theirs) and n.startswith("_") and not n.startswith("__")}
        private = {n for n in private if callable(getattr(theirs, n)) and n != "_abc_impl"}
        assert private <= set(names), f"{ours.__name__}: add {sorted(private - set(names))} to the table"


def test_peft_enters_the_tuners_hooks_around_forward_and_generate(monkeypatch):
    """`peft_psr/model.py` takes `adapter_names` and the lock from there."""
    entered = []
    original = PSRModel._enable_peft_forward_hooks

    def spy(self, *args, **kwargs):
        entered.append(kwargs.get("adapter_names"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PSRModel, "_enable_peft_forward_hooks", spy)
    model = get_peft_model(tiny_model(), PSRConfig()).eval()
    ids = torch.tensor([[1, 9, 12]])
    model(input_ids=ids, adapter_names=["default"])
    model.generate(input_ids=ids, adapter_names=["__base__"], max_new_tokens=1)
    assert entered == [["default"], ["__base__"]]
    assert "adapter_names" in model.special_peft_forward_args


def test_the_table_of_types_is_closed_and_has_no_psr():
    """`peft_psr/registration.py` enters one of its own."""
    assert "PSR" not in PeftType.__members__


def test_a_tuner_is_told_from_its_prefix_and_layer_class():
    """`peft_psr/model.py`: `prefix` and `tuner_layer_cls` are read by `BaseTuner`."""
    source = inspect.getsource(BaseTuner)
    assert "self.prefix" in source and "self.tuner_layer_cls" in source


def test_what_the_models_own_generate_is_replaced_by_lies_in_its_dictionary():
    """`peft_psr/hooks.py`: transformers finds `generate` and `init_continuous_batching` on the object first."""
    model = get_peft_model(tiny_model(), PSRConfig())
    base = model.get_base_model()
    assert isinstance(base.generate, SteeredGenerate) and isinstance(base.init_continuous_batching, SteeredBatching)
    model.unload()
    assert not {"generate", "init_continuous_batching"} & set(vars(base))


def test_a_wrapper_of_a_saved_module_keeps_the_names_of_its_adapters():
    """`other_adapters.py` and `model.py` read `_adapters`, `_disable_adapters` and `_active_adapter`."""
    model = get_peft_model(tiny_model(), PSRConfig(modules_to_save=["lm_head"]))
    wrapper = model.get_base_model().lm_head
    assert wrapper._adapters == {"default"} and wrapper._disable_adapters is False
    assert next(iter(model.psr_layers().values()))._active_adapter == ["default"]


def test_accelerates_hook_keeps_weights_in_a_map():
    """`peft_psr/model.py` reads `module._hf_hook.weights_map` of what is offloaded."""
    layer = nn.Linear(2, 2)
    add_hook_to_module(layer, AlignDevicesHook(offload=True, weights_map=dict(layer.named_parameters())))
    assert set(layer._hf_hook.weights_map) == {"weight", "bias"}


def test_the_hubs_errors_and_those_of_its_connection_have_one_base():
    """`peft_psr/hub/push.py` catches it: httpx's, of the version that the Hub's client uses."""
    base = HfHubHTTPError.__bases__[0]
    client = importlib.import_module(base.__module__.partition(".")[0])
    assert base.__name__ == "HTTPError" and client.__name__.startswith("httpx")
    assert issubclass(client.ConnectError, base) and issubclass(client.ReadTimeout, base)


def test_a_file_is_mapped_and_written_through(tmp_path):
    """`training/passes/activation_cache.py` keeps activations there."""
    path = tmp_path / "values"
    torch.from_file(str(path), shared=True, size=4, dtype=torch.bfloat16).fill_(1.5)
    assert torch.from_file(str(path), shared=True, size=4, dtype=torch.bfloat16).tolist() == [1.5] * 4


def test_the_limit_of_graphs_is_patched_for_a_while():
    """`training/passes/compiled.py`."""
    before = torch._dynamo.config.cache_size_limit
    with torch._dynamo.config.patch(cache_size_limit=64):
        assert torch._dynamo.config.cache_size_limit == 64
    assert torch._dynamo.config.cache_size_limit == before


def test_indices_grouped_by_length_follow_the_generator():
    """`training/trainer/length_grouping.py`: a resumed run finds the order again."""
    orders = [
        get_length_grouped_indices([3, 1, 2, 5] * 8, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(32))


def test_the_trainer_has_what_ours_reads_of_it(tmp_path):
    """`training/trainer/trainer.py`."""
    from peft_psr.training import PSRTrainingArguments

    trainer = Trainer(tiny_model(), PSRTrainingArguments(str(tmp_path), use_cpu=True))
    assert trainer.model_accepts_loss_kwargs in (True, False)
    assert trainer.accelerator.state.dynamo_plugin.backend is not None
    assert trainer.is_fsdp_enabled is False and trainer.is_in_train is False
    assert {"train_sampling_strategy", "torch_compile_backend", "torch_compile_mode"} <= set(vars(trainer.args))
