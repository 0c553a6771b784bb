"""PEFT's own checks of a tuner, taken from the source distribution of the installed version and run on PSR.

The wheel comes without tests, so the source distribution is downloaded once into the user's cache (all tests here are
skipped where that can't be done); nothing of it is kept in this repository. Every check that PEFT writes for any tuner
either runs or stands in a table below with the reason why it can't. A check that a new version of PEFT adds is in
neither, and fails `test_every_check_is_accounted_for`. `docs/peft_checks.md` has the outcomes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tarfile
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LAYOUTS, tiny_model
from helpers.peft_checks import (
    ACTIVE,
    COMMON,
    COMMON_AS_LORA,
    COMMON_NOT_RUN,
    CONFIG,
    CUSTOM,
    CUSTOM_BY_CLASS,
    CUSTOM_CONFIGS,
    CUSTOM_NOT_RUN,
    CUSTOM_UP_TO_MERGING,
    DECODER_CONFIGS,
    MIXED,
    PACKAGE,
    SUITES,
    TWO_ADAPTERS,
    active_arguments,
    custom_arguments,
    decoder_arguments,
    fetch_source,
    run_check,
    runs,
    unmergeable,
)
from torch import nn
from transformers import AutoModelForCausalLM

from peft_psr import PSRConfig
from peft_psr.layer import PSRLayer


@pytest.fixture(scope="session")
def peft_tests() -> dict[str, Any]:
    """PEFT's classes of checks by name, from the source distribution; downloaded at the first use."""
    release = version("peft")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "peft-psr" / f"peft-{release}-tests"
    if not folder.is_dir():
        try:
            fetch_source(release, folder)
        except (OSError, subprocess.SubprocessError, tarfile.TarError, StopIteration) as error:
            output = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
            if not folder.is_dir():  # nor has another run put it there in the meantime
                pytest.skip(f"no source distribution of peft {release}: {output[-1] if output else repr(error)}")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, PACKAGE, package)
        if importlib.util.find_spec("diffusers") is None:  # imported for checks of Stable Diffusion only
            stub = types.ModuleType("diffusers")
            stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "diffusers", stub)
        try:
            return {
                suite: getattr(importlib.import_module(f"{PACKAGE}.{module}"), suite)
                for suite, (module, _, _) in SUITES.items()
            }
        except ImportError as error:
            pytest.skip(f"the tests of peft {release} need a package that is not installed: {error}")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved tiny model of each layout, whose folder's name takes the place of a name on the Hub."""
    folders = {}
    for layout in LAYOUTS:
        # PEFT skips checks of "gpt2" for most tuners, since they can't wrap its Conv1D; PSR edits whole layers
        folder = tmp_path_factory.mktemp("models") / layout.replace("gpt2", "gpt-2")
        tiny_model(layout).save_pretrained(folder)
        folders[layout] = str(folder)
    return folders


@pytest.fixture(scope="session")
def decoder_tester(peft_tests: dict[str, Any]) -> Any:
    """PEFT's common tester, for decoder models."""

    class DecoderTester(peft_tests["PeftCommonTester"]):
        transformers_class = AutoModelForCausalLM

        def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
            rows = {"input_ids": [[1, 9, 12], [1, 17, 2]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
            return {name: torch.tensor(values, device=self.torch_device) for name, values in rows.items()}

    return DecoderTester()


@pytest.mark.parametrize("suite", SUITES)
def test_every_check_is_accounted_for(peft_tests: dict[str, Any], suite: str) -> None:
    _, run, not_run = SUITES[suite]
    checks = set()
    for name, check in inspect.getmembers(peft_tests[suite], inspect.isfunction):
        for_any_tuner = {"config_cls", "config_class", "config0"} & inspect.signature(check).parameters.keys()
        if name.startswith("_test_") or name.startswith("test_") and for_any_tuner:
            checks.add(name)
    inherited = {*COMMON, *COMMON_AS_LORA, *COMMON_NOT_RUN} if suite == "TestPeftCustomModel" else set()
    assert not set(run) & set(not_run)
    assert checks - inherited == set(run) | set(not_run)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", DECODER_CONFIGS)
@pytest.mark.parametrize(("check", "kwargs"), runs(COMMON))
def test_decoder_model(
    decoder_tester: Any, model_folders: dict[str, str], check: str, kwargs: dict[str, Any], config: str, layout: str
) -> None:
    arguments = decoder_arguments(model_folders[layout], config, **kwargs)
    if check == "_test_training_layer_indexing":  # sets the layers itself
        arguments["config_kwargs"].pop("layers_to_transform", None)
    run_check(getattr(decoder_tester, check), **arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", DECODER_CONFIGS)
@pytest.mark.parametrize("check", COMMON_AS_LORA)
def test_decoder_model_as_lora(
    decoder_tester: Any, model_folders: dict[str, str], check: str, config: str, layout: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys.modules[f"{PACKAGE}.testing_common"], "LoraConfig", PSRConfig)
    run_check(getattr(decoder_tester, check), **decoder_arguments(model_folders[layout], config))


@pytest.mark.parametrize("config", CUSTOM_CONFIGS)
@pytest.mark.parametrize(("check", "kwargs"), runs(CUSTOM))
def test_custom_model(
    peft_tests: dict[str, Any], check: str, kwargs: dict[str, Any], config: str, tmp_path: Path
) -> None:
    if check == "test_active_adapter" and "modules_to_save" in CUSTOM_CONFIGS[config]:
        pytest.skip("PEFT has no several active adapters with modules_to_save")
    test = getattr(peft_tests["TestPeftCustomModel"](), check)
    if "tmp_path" in inspect.signature(test).parameters:
        kwargs = {**kwargs, "tmp_path": tmp_path}
    run_check(test, **custom_arguments(config, **kwargs))


@pytest.mark.parametrize("check", CUSTOM_BY_CLASS)
def test_custom_model_by_class(peft_tests: dict[str, Any], check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # these look for the tuner layer at its target's name; PSR leaves the target where it is and puts `psr` inside
    for name in ("active_adapters", *PSRLayer.adapter_layer_names):
        monkeypatch.setattr(nn.Linear, name, property(lambda self, name=name: getattr(self.psr, name)), raising=False)
    monkeypatch.setattr(nn.Linear, "adapter_layer_names", PSRLayer.adapter_layer_names, raising=False)
    test = getattr(peft_tests["TestPeftCustomModel"](), check)
    by_class = "config_cls" in inspect.signature(test).parameters
    run_check(test, PSRConfig if by_class else PSRConfig(target_modules=["lin0"], init_weights=False))


@pytest.mark.parametrize("pair", TWO_ADAPTERS)
@pytest.mark.parametrize("check", ACTIVE)
def test_several_active_adapters(peft_tests: dict[str, Any], check: str, pair: str) -> None:
    run_check(getattr(peft_tests["TestMultipleActiveAdapters"](), check), **active_arguments(pair))


@pytest.mark.parametrize("check", MIXED)
def test_mixed_rows(peft_tests: dict[str, Any], check: str) -> None:
    targets = {"different_target_layers": (["lin0"], ["lin1"]), "partly_overlapping": (["lin0"], ["lin0", "lin1"])}
    pair = next((pair for name, pair in targets.items() if name in check), (["lin0"], ["lin0"]))
    saved = ["lin1"] if "modules_to_save" in check else None
    configs = [PSRConfig(target_modules=t, r=4, init_weights=False, modules_to_save=saved) for t in pair]
    run_check(getattr(peft_tests["TestMixedAdapterBatches"](), check), check, *configs)


def test_mixed_rows_name_what_is_missing(peft_tests: dict[str, Any]) -> None:
    test = peft_tests["TestMixedAdapterBatches"]().test_mixed_adapter_batches_lora_wrong_adapter_name_raises
    run_check(test, "PSR", PSRConfig(target_modules=["lin0"], r=4, init_weights=False))


@pytest.mark.parametrize("targets", ["l1.*", "(l1|psr_).*"])
def test_own_layers_are_no_targets(peft_tests: dict[str, Any], targets: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l1 = nn.Linear(10, 20)

    test = peft_tests["TestAdapterTargeting"]().test_self_targeting_is_ignored
    run_check(test, Model, PSRConfig, {"target_modules": targets})


@pytest.mark.parametrize(("check", "kwargs"), runs(CONFIG))
def test_config(
    peft_tests: dict[str, Any], check: str, kwargs: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    test = getattr(peft_tests["TestPeftConfig"](), check)
    arguments = {"config_class": PSRConfig, "mandatory_kwargs": {}, **kwargs}
    given = {
        name: arguments[name] if name in arguments else request.getfixturevalue(name)
        for name in inspect.signature(test).parameters
    }
    run_check(test, **given)


@pytest.mark.parametrize("check", unmergeable(COMMON_NOT_RUN))
def test_decoder_model_refuses_to_merge(decoder_tester: Any, model_folders: dict[str, str], check: str) -> None:
    with pytest.raises(ValueError, match="can't be merged"):
        run_check(getattr(decoder_tester, check), **decoder_arguments(model_folders["llama"], "relu-all"))


@pytest.mark.parametrize("config", CUSTOM_CONFIGS)
@pytest.mark.parametrize("check", [*CUSTOM_UP_TO_MERGING, *unmergeable(CUSTOM_NOT_RUN)])
def test_custom_model_refuses_to_merge(peft_tests: dict[str, Any], check: str, config: str) -> None:
    with pytest.raises(ValueError, match="can't be merged"):
        run_check(getattr(peft_tests["TestPeftCustomModel"](), check), **custom_arguments(config))
