"""Old import paths, and the registry that rooms use."""

import importlib
import json
import subprocess
import sys

import pytest

from peft_psr._moved import MOVED
from peft_psr.registry import Registry


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_is_the_same_module(old, new):
    assert importlib.import_module(old) is importlib.import_module(new)
    assert importlib.import_module(new).__spec__.name == new


@pytest.mark.long
def test_old_paths_first():
    code = "import peft_psr.chat; from peft_psr.training.collator import TripletCollator as c; print(c.__module__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "peft_psr.training.data.collator"


def test_a_module_that_became_a_room_gives_what_it_gave():
    from peft_psr.training.sampling import LocalSampler, sample_completions
    from peft_psr.training.sampling.local import LocalSampler as Sampler

    assert LocalSampler is Sampler and sample_completions.__module__ == Sampler.__module__


def test_a_registry_loads_nothing_until_it_is_asked():
    registry: Registry = Registry("toy", {"encoder": "json:JSONEncoder", "lost": "no_such_module:thing"})
    assert list(registry) == ["encoder", "lost"] and len(registry) == 2 and "lost" in registry
    assert registry["encoder"] is json.JSONEncoder
    with pytest.raises(ModuleNotFoundError):
        registry["lost"]
    with pytest.raises(ValueError, match="no toy 'encodr'; there are: encoder, lost. Did you mean 'encoder'"):
        registry["encodr"]


def test_what_is_added_can_be_taken_out_again():
    registry: Registry[int] = Registry("number", {"one": 1})
    registry.add("two", 2)
    assert registry["two"] == 2
    with pytest.raises(ValueError, match="There is a number 'two' already"):
        registry.add("two", 3)
    registry.remove("two")
    with pytest.raises(ValueError, match="no number 'two'"):
        registry.remove("two")
