"""A training script as a user writes it; `test_distributed.py` runs it in one process and in two.

    PYTHONPATH=tests python -m helpers.distributed_training BASE OUTPUT CASE ...
    PYTHONPATH=tests accelerate launch --config_file CONFIG -m helpers.distributed_training BASE OUTPUT CASE ...

BASE is a folder with the base model. Each case leaves its adapter in OUTPUT/<case>, and what process i saw in
OUTPUT/<case>/rank_<i>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.distributed import DistributedConfig

from helpers.tokenizers import tiny_tokenizer
from helpers.triplets import triplets
from peft_psr import PSRConfig
from peft_psr.training import PSRTrainer, PSRTrainingArguments, initialize_psr_weights


GLOBAL_BATCH = 4
# of unequal length, and not a multiple of the batch
TRAIN = triplets(completions=["tea is good", "a b c d e", "dogs are good now", "yes", "no", "b a c now", "e tea dogs"])
HELD_OUT = triplets(completions=["tea", "is good", "dogs dogs dogs a b", "no yes"])
# only one triplet has a strength, so only one process sees any gate at work
ONE_SCORED = triplets(completions=["yes"]) + triplets(completions=["tea is good", "a b", "no"], trait_score=0.0)
PROMPT = [1, 5, 8, 9, 10, 2, 6]

SGD = {"optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.0}
CASES = {
    "mse": {"normalize_loss": "global", **SGD},
    "mse_adamw": {"normalize_loss": "layer"},
    "ll": {"objective": "ll", **SGD},
    "ll_adamw": {"objective": "ll"},
    "kl": {"objective": {"kl": 1.0, "mse": 0.1}, **SGD},
    "accumulated": {
        "objective": {"mse": 1.0, "ll": 0.1},
        "regularizer": 0.1,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        **SGD,
    },
    "resumed_adamw": {"normalize_loss": "layer"},
    "started": SGD,
    "one_scored": {"max_steps": 1, **SGD},
    # the last batch is not full
    "uneven": {"max_steps": 2, "dataloader_drop_last": False, "train_sampling_strategy": "sequential", **SGD},
    "filled_up": {"max_steps": 2, "train_sampling_strategy": "sequential", **SGD},
    "sharded_mse": {"normalize_loss": "global", "save_strategy": "no", **SGD},
    "sharded_ll": {"objective": "ll", "save_strategy": "no"},
    "sharded_kl": {"objective": "kl", "save_strategy": "no", **SGD},
    "bfloat16": {"bf16": True, "normalize_loss": "global", **SGD},
}
DATA = {"one_scored": ONE_SCORED, "uneven": TRAIN[:6], "filled_up": TRAIN[:6] + TRAIN[:2]}


def shard_on_cpu(arguments: PSRTrainingArguments) -> None:
    """Turn on FSDP, which accelerate does on accelerators only: on a CPU it goes on with DDP, without a word."""
    state = Accelerator(cpu=True, mixed_precision="bf16" if arguments.bf16 else "no").state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if arguments.bf16:
        state.fsdp_plugin.set_mixed_precision("bf16")
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP


def add_adapter(model: PreTrainedModel, case: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, PSRConfig(r=2, init_weights=case.endswith("adamw")))


def train(base: str, output: Path, case: str) -> None:
    settings = {"max_steps": 6, "save_steps": 3, "dataloader_drop_last": True, **CASES[case]}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    arguments = PSRTrainingArguments(
        output_dir=str(output / case),
        use_cpu=True,
        logging_steps=1,
        per_device_train_batch_size=GLOBAL_BATCH // settings.get("gradient_accumulation_steps", 1) // processes,
        per_device_eval_batch_size=GLOBAL_BATCH // processes,
        **settings,
    )
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpu(arguments)
    sharded = {"distributed_config": DistributedConfig(fsdp_size=processes)} if case.startswith("sharded") else {}
    model = AutoModelForCausalLM.from_pretrained(base, **sharded)
    model = add_adapter(model, case)
    if case == "started":
        initialize_psr_weights(model, TRAIN, processing_class=tiny_tokenizer(), progress=False)
    trainer = PSRTrainer(model, arguments, DATA.get(case, TRAIN), HELD_OUT, processing_class=tiny_tokenizer())
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    checkpoint = str(output / "mse_adamw" / "checkpoint-3") if case == "resumed_adamw" else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    with torch.no_grad():
        logits = trainer.model(torch.tensor([PROMPT])).logits[0, -1]
    seen = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "normalizer": {name: value.item() for name, value in trainer.normalizers.get("mse", {}).items()},
        "dead_gates": trainer.dead_gates,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "logits": logits.tolist(),
    }
    (output / case / f"rank_{arguments.process_index}.json").write_text(json.dumps(seen))


def main(base: str, output: str, *cases: str) -> None:
    for case in cases:
        train(base, Path(output), case)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a loaded machine now and then aborts in the teardown of torch's threads, when all is written
