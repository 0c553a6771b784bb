"""Which of PEFT's own checks of a tuner run on PSR, on what, and which can't, with the reason."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TaskType

from helpers.models import LAYERS
from peft_psr import PSRConfig
from peft_psr.config import GATES


PACKAGE = "peft_sdist_tests"
"""Name under which the source distribution's `tests` folder is imported; its modules import each other relatively."""

NO_MERGING = "A PSR edit can't be merged into base weights: it depends on each token's activations."
NO_SUM_OF_WEIGHTS = (
    "It combines weight matrices (ties, dare, magnitude pruning, rank patterns) that PSR does not have."
)
TRAINS_ON_MIXED_ROWS = "LoRA refuses `adapter_names` in training; PSR's rows carry gradients, so it does not."
LORA_ONLY = "It is about layers that only LoRA wraps (DoRA, convolutions, attention) or about its speed."
ALWAYS_FLOAT32 = "PSR's weights are float32 by design, whatever the model's dtype and `autocast_adapter_dtype`."
NO_BIAS_OPTION = "PSR has no `bias` option; PEFT runs it for LoRA and BOFT only."
FROM_THE_HUB = "It downloads a LoRA configuration from the Hub."

# Checks of `PeftCommonTester` that run on decoder models: name -> keyword arguments of each run.
COMMON: dict[str, list[dict[str, Any]]] = {
    "_test_model_attr": [{}],
    "_test_adapter_name": [{}],
    "_test_prepare_for_training": [{}],
    "_test_load_model_low_cpu_mem_usage": [{}],
    "_test_save_pretrained": [{}, {"safe_serialization": False}],
    "_test_save_pretrained_selected_adapters": [{}, {"safe_serialization": False}],
    "_test_save_pretrained_adapter_name_substring": [{}],
    "_test_from_pretrained_config_construction": [{}],
    "_test_load_multiple_adapters": [{}],
    "_test_generate": [{}],
    "_test_generate_pos_args": [{"raises_err": False}],
    "_test_generate_half_prec": [{}],
    "_test_training": [{}],
    "_test_inference_safetensors": [{}],
    "_test_training_layer_indexing": [{}],
    "_test_training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
    "_test_peft_model_device_map": [{}],
    "_test_delete_adapter": [{}],
    "_test_delete_inactive_adapter": [{}],
    "_test_delete_unknown_adapter_raises": [{}],
    "_test_unload_adapter": [{}],
    "_test_disable_adapter": [{}],
    "_test_passing_input_embeds_works": [{"test_name": ""}],
    "_test_lora_conversion": [{}],
    "_test_get_base_model_state_dict": [{}],
}
# The same, which PEFT skips unless the configuration is LoRA's.
COMMON_AS_LORA = ["_test_mixed_adapter_batches", "_test_generate_with_mixed_adapter_batches_and_beam_search"]
COMMON_NOT_RUN: dict[str, str] = {
    "_test_add_adapter_no_autocast_adapter_dtype": ALWAYS_FLOAT32,
    "_test_merge_layers": NO_MERGING,
    "_test_merge_layers_fp16": NO_MERGING,
    "_test_merge_layers_nan": NO_MERGING,
    "_test_merge_layers_multi": NO_MERGING,
    "_test_merge_layers_is_idempotent": NO_MERGING,
    "_test_safe_merge": NO_MERGING,
    "_test_training_prompt_learning_tasks": "It is for prompt learning: it reads `model.prompt_encoder`.",
    "_test_weighted_combination_of_adapters": NO_SUM_OF_WEIGHTS,
    "_test_weighted_combination_of_adapters_lora": NO_SUM_OF_WEIGHTS,
    "_test_weighted_combination_of_adapters_ia3": NO_SUM_OF_WEIGHTS,
    "_test_adding_multiple_adapters_with_bias_raises": NO_BIAS_OPTION,
}

# Tests of `TestPeftCustomModel`, on PEFT's own MLP: those that take a model's name and a configuration, ...
CUSTOM: dict[str, list[dict[str, Any]]] = {
    "test_attributes_parametrized": [{}],
    "test_adapter_name": [{}],
    "test_save_pretrained": [{}],
    "test_save_load_roundtrip_direct_injection": [{}],
    "test_save_pretrained_pickle": [{}],
    "test_save_pretrained_adapter_name_substring": [{}],
    "test_load_model_low_cpu_mem_usage": [{}],
    "test_from_pretrained_config_construction": [{}],
    "test_load_multiple_adapters": [{}],
    "test_training_custom_models": [{}],
    "test_inference_safetensors": [{}],
    "test_peft_model_device_map": [{}],
    "test_in_features_out_features_exposed": [{}],
    "test_forward_output_finite": [{}],
    "test_adapter_dtype_autocast": [
        {"dtype": dtype, "autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low}
        for low in (False, True)
        for dtype, autocast in [
            (torch.float16, True),
            (torch.bfloat16, True),
            (torch.float32, True),
            (torch.float32, False),  # with half precision it would have the adapter follow: see ALWAYS_FLOAT32
        ]
    ],
    "test_only_params_are_updated": [{}],
    "test_save_load_roundtrip": [{}],
    "test_parameters_after_loading_model": [{}],
    "test_disable_adapters": [{}],
    "test_active_adapter": [{}],
    "test_disable_adapters_exiting_context_restores_previous_state": [{}],
    "test_disable_adapter_is_reentrant": [{}],
    "test_disable_adapters_exiting_context_irregular_state": [{}],
    "test_delete_adapter": [{}],
    "test_delete_adapter_properly_cleans_up_after_itself": [{}],
    "test_delete_inactive_adapter": [{}],
    "test_delete_unknown_adapter_raises": [{}],
    "test_get_base_model_state_dict": [{}],
}
# ... the same, which after their forward pass go on to merge, where a PSR model refuses, ...
CUSTOM_UP_TO_MERGING = [
    "test_forward_float16",
    "test_forward_bfloat16",
    "test_forward_float16_no_autocast",
    "test_forward_bfloat16_no_autocast",
]
# ... and those that take a class of configurations, or one configuration.
CUSTOM_BY_CLASS = [
    "test_set_adapter_non_overlapping_modules",
    "test_set_adapter_non_overlapping_modules_to_save",
    "test_multiple_active_adapters_with_same_modules_to_save_raises",
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises",
    "test_multiple_active_adapters_with_different_modules_to_save_works",
    "test_set_requires_grad",
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_adapter_name_makes_no_difference",
]
CUSTOM_NOT_RUN: dict[str, str] = {
    "test_merge_layers": NO_MERGING,
    "test_merge_layers_fp16": NO_MERGING,
    "test_merge_layers_is_idempotent": NO_MERGING,
    "test_merge_layers_is_deterministic_in_train_mode": NO_MERGING,
    "test_safe_merge": NO_MERGING,
    "test_disable_adapters_with_merging": NO_MERGING,
    "test_delete_merged_adapter_raises_without_mutation": NO_MERGING,
    "test_delete_merged_adapter_only_rejects_the_merged_one": NO_MERGING,
    "test_disable_adapter_with_bias_warns": NO_BIAS_OPTION,
    "test_adding_multiple_adapters_with_bias_raises": NO_BIAS_OPTION,
    "test_add_weighted_adapter_cat_with_rank_pattern": NO_SUM_OF_WEIGHTS,
}

# Tests of `TestMultipleActiveAdapters`, on the same MLP.
ACTIVE = ["test_multiple_active_adapters_forward"]
ACTIVE_NOT_RUN: dict[str, str] = {
    "test_multiple_active_adapters_merge_and_unmerge": NO_MERGING,
    "test_merge_layers_multi": NO_MERGING,
    "test_sequential_merge_matches_batch_merge": NO_MERGING,
    "test_unmerge_after_sequential_merge_restores_base": NO_MERGING,
}

# Tests of `TestMixedAdapterBatches`, on the same MLP.
MIXED = [
    "test_mixed_adapter_batches_mlp",
    "test_mixed_adapter_batches_different_target_layers",
    "test_mixed_adapter_batches_multiple_modules_to_save",
    "test_mixed_adapter_batches_partly_overlapping_target_layers",
    "test_mixed_adapter_batches_length_mismatch_raises",
    "test_mixed_adapter_batches_disabled",
]
MIXED_NOT_RUN: dict[str, str] = {
    "test_mixed_adapter_batches_training_mode_raises": TRAINS_ON_MIXED_ROWS,
    "test_mixed_adapter_batches_merged_raises": NO_MERGING,
    "test_mixed_adapter_batches_unsupported_layer_raises": LORA_ONLY,
    "test_mixed_adapter_batches_lora_conv1d_emb": LORA_ONLY,
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": LORA_ONLY,
    "test_mixed_adapter_batches_lora_conv2d": LORA_ONLY,
    "test_mixed_adapter_batches_mha_raises": LORA_ONLY,
    "test_mixed_adapter_batches_lora_opt_timing": LORA_ONLY,
}

# Tests of `TestPeftConfig`: name -> keyword arguments of each run.
CONFIG: dict[str, list[dict[str, Any]]] = {
    "test_methods": [{}],
    "test_valid_task_type": [{"valid_task_type": kind} for kind in [*TaskType, None]],
    "test_invalid_task_type": [{}],
    "test_save_pretrained": [{}],
    "test_from_json_file": [{}],
    "test_to_dict": [{}],
    "test_set_attributes": [{}],
    "test_config_copy": [{}],
    "test_config_deepcopy": [{}],
    "test_config_pickle_roundtrip": [{}],
    "test_save_pretrained_with_target_modules": [{}],
    "test_from_pretrained_forward_compatible": [{}],
    "test_from_pretrained_forward_compatible_load_from_peft_config": [{}],
    "test_from_pretrained_sanity_check": [{}],
    "test_config_layers_to_transform_index_zero": [{}],
    "test_peft_version_is_stored": [{"version": "0.17.0"}],
    "test_peft_version_is_dev_version": [{}],
    "test_peft_version_is_dev_version_but_commit_hash_cannot_be_determined": [{}],
    "test_peft_version_warn_when_commit_hash_errors": [{}],
}
CONFIG_NOT_RUN: dict[str, str] = {
    "test_from_pretrained": FROM_THE_HUB,
    "test_from_pretrained_cache_dir": FROM_THE_HUB,
    "test_save_pretrained_with_runtime_config": FROM_THE_HUB,
}

# PEFT's class -> its module, and what of it is run and not run.
SUITES: dict[str, tuple[str, Collection[str], dict[str, str]]] = {
    "PeftCommonTester": ("testing_common", [*COMMON, *COMMON_AS_LORA], COMMON_NOT_RUN),
    "TestPeftCustomModel": (
        "test_custom_models",
        [*CUSTOM, *CUSTOM_UP_TO_MERGING, *CUSTOM_BY_CLASS],
        CUSTOM_NOT_RUN,
    ),
    "TestMultipleActiveAdapters": ("test_custom_models", ACTIVE, ACTIVE_NOT_RUN),
    "TestMixedAdapterBatches": ("test_custom_models", MIXED, MIXED_NOT_RUN),
    "TestPeftConfig": ("test_config", CONFIG, CONFIG_NOT_RUN),
    "TestAdapterTargeting": ("test_other", ["test_self_targeting_is_ignored"], {}),
}

# init_weights=False: many checks want an adapter that changes the output from the start.
DECODER_CONFIGS: dict[str, dict[str, Any]] = {
    "relu-all": {"gate": "relu"},
    "relu-one-r2": {"gate": "relu", "r": 2, "layers_to_transform": 1},
    "constant-all-r2": {"gate": "constant", "r": 2},
    "constant-one": {"gate": "constant", "layers_to_transform": [LAYERS - 1]},
}
DECODER_SETTINGS = {"task_type": "CAUSAL_LM", "init_weights": False}
# PEFT's inputs for its MLP are all but collinear, so a random gate may be closed on every one: hence several of them.
CUSTOM_CONFIGS: dict[str, dict[str, Any]] = {
    "relu": {"target_modules": ["lin0"], "r": 4},
    "relu-both": {"target_modules": ["lin0", "lin1"], "r": 4},
    "constant": {"target_modules": ["lin0"], "gate": "constant"},
    "relu-saves-lin1": {"target_modules": ["lin0"], "r": 4, "modules_to_save": ["lin1"]},
}
TWO_ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "same": [{"target_modules": ["lin0"], "r": 4, "init_weights": False}] * 2,
    "different": [{"target_modules": [name], "r": 4, "init_weights": False} for name in ("lin0", "lin1")],
    "two-ranks": [{"target_modules": ["lin0"], "r": rank, "init_weights": False} for rank in (3, 4)],
    "two-gates": [{"target_modules": ["lin0"], "r": 4, "init_weights": False, "gate": gate} for gate in GATES],
}


def fetch_source(release: str, folder: Path) -> None:
    """Unpack the `tests` folder of PEFT's source distribution into `folder`, which appears only when complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--retries", "1", "--timeout", "15", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        subprocess.run([*command, f"peft=={release}", "-d", work], check=True, capture_output=True, timeout=120)
        with tarfile.open(next(Path(work).glob("peft-*.tar.gz"))) as archive:
            # Python before 3.10.12 and 3.11.4 has no filters
            archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        (Path(work) / f"peft-{release}" / "tests").rename(folder)


def run_check(check: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run a check; one that PEFT skips by itself belongs in the table of those that don't run."""
    torch.manual_seed(0)
    try:
        check(*args, **kwargs)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"PEFT skips this check, so list it with the reason: {skipped}")


def runs(table: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """Parameters (check, keyword arguments) for pytest."""
    return [
        pytest.param(check, kwargs, id="-".join([check.lstrip("_").removeprefix("test_"), *map(str, kwargs.values())]))
        for check, several in table.items()
        for kwargs in several
    ]


def unmergeable(table: dict[str, str]) -> list[str]:
    """The checks of a table that merge."""
    return [check for check, reason in table.items() if reason == NO_MERGING]


def decoder_arguments(model_id: str, config: str, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a check of `PeftCommonTester`."""
    settings = {**DECODER_SETTINGS, **DECODER_CONFIGS[config]}
    return {"model_id": model_id, "config_cls": PSRConfig, "config_kwargs": settings, **kwargs}


def custom_arguments(config: str, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a test of `TestPeftCustomModel`."""
    settings = CUSTOM_CONFIGS[config].copy()
    return {"test_name": config, "model_id": "MLP", "config_cls": PSRConfig, "config_kwargs": settings, **kwargs}


def active_arguments(pair: str) -> dict[str, Any]:
    """Arguments of a test of `TestMultipleActiveAdapters`."""
    first, second = TWO_ADAPTERS[pair]
    names = {"test_name": pair, "tuner_method": "psr", "config_cls": PSRConfig}
    return {**names, "config_kwargs_1": first, "config_kwargs_2": second}
