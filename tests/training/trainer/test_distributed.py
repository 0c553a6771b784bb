"""Two processes on a CPU, started by `accelerate launch`, train the adapter that one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import distributed_training
from helpers.distributed_training import PROMPT, add_adapter
from helpers.models import LAYERS, WIDTH, tiny_model
from helpers.paths import TESTS
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


TRAINED = ["mse", "mse_adamw", "ll", "ll_adamw", "kl", "accumulated", "started"]
CASES = [*TRAINED, "resumed_adamw", "one_scored", "uneven", "filled_up"]
SHARDED = ["sharded_mse", "sharded_ll", "sharded_kl"]
# Float32 sums in another order; measured 6e-8, and 6e-9 with AdamW, whose first steps could have blown up rounding
# errors in gradients near 0. Weights move by 2e-3 or more.
TOLERANCE = 1e-6

# accelerate starts several processes on one machine only under these two names; on a CPU the first one gives DDP
DDP = {"distributed_type": "MULTI_GPU"}
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
    },
}


def launch(folder: Path, base: Path, config: dict, cases: list[str]) -> str:
    """Run the training script in two processes; what it wrote to its standard streams."""
    config = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "machine_rank": 0,
              "mixed_precision": "no", "use_cpu": True, "main_process_port": 0, **config}  # fmt: skip
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["-m", distributed_training.__name__, str(base), str(folder), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `launch`: the ridge start shows in which order its sums were taken
    try:
        distributed_training.main(str(base), str(folder), *CASES, *SHARDED)
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def ddp(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    launch(folder, base, DDP, [*CASES, *SHARDED])
    return folder


@pytest.fixture(scope="module")
def fsdp2(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    (folder / "log").write_text(launch(folder, base, FSDP2, CASES))
    return folder


@pytest.fixture(params=["ddp", "fsdp2"])
def two(request) -> Path:
    return request.getfixturevalue(request.param)


def weights(folder: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(folder / case / "adapter_model.safetensors")


def seen(folder: Path, case: str, rank: int = 0) -> dict:
    return json.loads((folder / case / f"rank_{rank}.json").read_text())


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("case", TRAINED)
def test_adapter_of_one_process(one, two, base, case):
    start = get_peft_model_state_dict(add_adapter(AutoModelForCausalLM.from_pretrained(base), case))
    assert distance(weights(one, case), start) > 2e-3
    assert distance(weights(two, case), weights(one, case)) < TOLERANCE


@pytest.mark.parametrize("case", [*TRAINED, "one_scored"])
def test_what_is_reported_covers_all_processes(one, two, case):
    expected = seen(one, case)
    assert len(expected["logs"]) == (1 if case == "one_scored" else 6)
    for rank in (0, 1):
        reported = seen(two, case, rank)
        assert reported["dead_gates"] == expected["dead_gates"]
        assert reported["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert reported["normalizer"] == pytest.approx(expected["normalizer"], rel=1e-5)
        for log, expected_log in zip(reported["logs"], expected["logs"], strict=True):
            assert log == pytest.approx(expected_log, rel=1e-5)


def test_wrappers_are_what_they_should_be(one, ddp, fsdp2):
    assert seen(one, "mse")["wrapper"] == "PeftModelForCausalLM"
    assert seen(ddp, "mse")["wrapper"] == "DistributedDataParallel"
    assert seen(fsdp2, "mse")["wrapper"] == "FSDPPeftModelForCausalLM"


@pytest.mark.parametrize("case", ["mse", "started"])
def test_saved_adapter_is_whole(two, base, case):
    shapes = {"gate_weight": (2, WIDTH), "gate_bias": (2,), "direction": (2, WIDTH)}
    saved = weights(two, case)
    assert len(saved) == LAYERS * len(shapes)
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32 and tuple(tensor.shape) == shapes[name.rsplit(".", 1)[1]]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), two / case)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
        with model.disable_adapter():
            unsteered = model(torch.tensor([PROMPT])).logits[0, -1]
    assert (logits - unsteered).abs().max() > 1e-2
    for rank in (0, 1):
        torch.testing.assert_close(logits, torch.tensor(seen(two, case, rank)["logits"]), atol=1e-5, rtol=1e-5)


def test_resumed_training_is_the_uninterrupted_one(one, two):
    # not 0: the teacher's activations are kept from the batch in which a triplet first came
    assert distance(weights(two, "resumed_adamw"), weights(two, "mse_adamw")) < 1e-8
    assert distance(weights(two, "resumed_adamw"), weights(one, "mse_adamw")) < TOLERANCE


def test_last_batch_is_filled_up_from_the_first_triplets(one, two):
    assert distance(weights(two, "uneven"), weights(one, "filled_up")) < TOLERANCE
    assert distance(weights(two, "uneven"), weights(one, "uneven")) > 1e-4


@pytest.mark.parametrize("case", SHARDED)
def test_base_model_sharded_while_it_loads(one, ddp, case):
    assert seen(ddp, case)["wrapper"] == "PeftModelForCausalLM"
    assert distance(weights(ddp, case), weights(one, case)) < TOLERANCE
    assert seen(ddp, case)["logs"][-1] == pytest.approx(seen(one, case)["logs"][-1], rel=1e-5)


def test_edit_is_safe_for_fsdp2(fsdp2):
    assert "returned a view tensor" not in (fsdp2 / "log").read_text()


@pytest.mark.slow
def test_mixed_precision_and_activation_checkpointing(one, base, tmp_path):
    more = {"fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_activation_checkpointing": True}
    cases = ["mse", "mse_adamw", "resumed_adamw", "bfloat16"]
    launch(tmp_path, base, {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], **more}}, cases)
    assert distance(weights(tmp_path, "mse"), weights(one, "mse")) < TOLERANCE
    assert distance(weights(tmp_path, "resumed_adamw"), weights(one, "mse_adamw")) < TOLERANCE
    # bfloat16 has 8 bits; the weights move by 0.2
    assert distance(weights(tmp_path, "bfloat16"), weights(one, "mse")) < 0.01
