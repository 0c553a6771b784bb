"""What an edit costs at inference: prefill and decoding of a model without it, with ours, and with the peers'.

    python benchmarks/inference.py --model 135m --rounds 30 --output inference.json

Times are ratios to the base model of the same round. `benchmarks/README.md` says what the variants and columns are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import PACKAGES, PEERS
from timing import Interval, Workload, count_operations, empty_cache, median_interval, ratio, static_cache, time_rounds
from transformers import PreTrainedModel
from variants import SHAPES, VARIANTS, Variant, build_model, edit_error

from peft_psr.files import write_json


BUILDERS = {**VARIANTS, **PEERS}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far a variant's logits may be from the reference's, as a share of what the edit changes."""


def version(package: str) -> str | None:
    """Installed version, or `None`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "peft-psr", *PACKAGES)},
    }


def floor(model: PreTrainedModel, task: Workload) -> dict[str, dict[str, float]]:
    """What the rank-1 edit of every layer can't do without, beside what the model does.

    The edit takes 4 d operations a token and layer, and must read its weights and read and write the stream once more.
    The model's bytes are its weights and its cache, which is what decoding one row waits for.

    Returns:
        For "prefill" and "decode" (one step): `operations`, as a share of the model's; `edit_bytes`; `model_bytes`.
    """
    config, (batch, prompt) = model.config, task.input_ids.shape
    layers, d, size = config.num_hidden_layers, config.hidden_size, model.dtype.itemsize
    head = config.vocab_size * d
    body = sum(parameter.numel() for parameter in model.model.layers.parameters())
    cached = 2 * layers * config.num_key_value_heads * config.head_dim * batch * size  # bytes for each position
    result = {}
    for phase, tokens, seen in (("prefill", prompt, prompt), ("decode", 1, prompt + task.new_tokens // 2)):
        attention = 4 * layers * config.num_attention_heads * config.head_dim * seen * tokens
        result[phase] = {
            "operations": 4 * d * layers * tokens / (2 * body * tokens + 2 * head + attention),
            "edit_bytes": layers * (2 * d * tokens * batch * size + (2 * d + 1) * 4),
            "model_bytes": (body + head) * size + cached * seen,
        }
    return result


def compiled(variant: Variant, device: str) -> Variant:
    """The variant with its forward compiled for fixed shapes, with CUDA graphs on a GPU."""
    mode = "reduce-overhead" if device.startswith("cuda") else None
    # torch.compile doesn't look at hooks when it picks compiled code, and all variants share the code of one forward
    compiled_forward = torch.compile(variant.forward, mode=mode, dynamic=False, isolate_recompiles=True)
    return replace(variant, forward=compiled_forward)


def graphs() -> int:
    """Graphs compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def prepare(base: PreTrainedModel, name: str, mode: str, task: Workload) -> tuple[Variant, Any, dict[str, Any]]:
    """Build a variant, warm it up, and see that it computes its edit.

    Returns:
        The variant, its static cache or `None`, and what is known of it: its error, and operations or graphs.

    Raises:
        ValueError: it computes something else.
        RuntimeError: its forward is compiled anew after the warm-up.
    """
    variant = BUILDERS[name](base, task.input_ids.shape[0])
    cache, facts = None, {}
    if mode == "compiled":
        variant = compiled(variant, str(base.device))
        cache = static_cache(base, task)
    before = graphs()
    prompt = task.input_ids.shape[1]
    ids = torch.cat([task.input_ids, task.input_ids[:, : min(3, task.new_tokens)]], dim=1)
    facts["edit_error"] = edit_error(base, variant, ids, prompt, empty_cache(base, cache))
    if facts["edit_error"] > TOLERANCE[base.dtype]:
        raise ValueError(
            f"its logits differ from the reference's by {facts['edit_error']:.2g} of what the edit changes"
        )
    time_rounds(base, {name: variant}, task, 2, {name: cache}, random.Random(0))
    if mode == "compiled":
        facts["graphs"] = graphs() - before
        # compiling anew at every call is a reason to leave it out
        with torch.compiler.set_stance("fail_on_recompile"):
            time_rounds(base, {name: variant}, task, 1, {name: cache}, random.Random(0))
    else:
        facts["operations"] = count_operations(base, variant, task)
    return variant, cache, facts


def measure(base: PreTrainedModel, mode: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One table: all variants at one batch size, eager or compiled."""
    torch.manual_seed(1)
    ids = torch.randint(base.config.vocab_size, (batch, args.prompt_length), device=base.device)
    task = Workload(ids, args.new_tokens, args.generate and mode == "eager")
    variants, caches, facts, skipped = {}, {}, {}, {}
    for name in args.only:
        print(f"{mode}, batch {batch}: {name}", file=sys.stderr, flush=True)
        try:
            variants[name], caches[name], facts[name] = prepare(base, name, mode, task)
        # a peer that is missing, breaks or computes something else is a result, not a reason to stop
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    seconds = {}
    if "base" not in skipped:
        with torch.compiler.set_stance("fail_on_recompile"):  # a round that compiles would measure the compiler
            seconds = time_rounds(base, variants, task, args.rounds, caches, random.Random(2))
    return {
        "mode": mode,
        "batch": batch,
        "layers": base.config.num_hidden_layers,
        "floor": floor(base, task),
        "facts": facts,
        "skipped": skipped,
        "seconds": seconds,
    }


def cell(interval: Interval, digits: int = 3, factor: float = 1.0) -> str:
    """Median and interval."""
    low, high = interval.low * factor, interval.high * factor
    return f"{interval.median * factor:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(section: dict[str, Any], prompt_length: int, new_tokens: int) -> str:
    """A section as Markdown."""
    seconds, batch, facts = section["seconds"], section["batch"], section["facts"]
    tokens = {"prefill": prompt_length * batch, "decode": batch, "generate": new_tokens * batch}
    quantities = list(next(iter(seconds.values()), {}))
    last = "operations added a layer" if section["mode"] == "eager" else "graphs"
    header = [section["mode"] + f", batch {batch}"]
    for quantity in quantities:
        header += [f"{quantity} tokens/s", "time / base"]
    header += ["decode over empty hook, %", last]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, times in seconds.items():
        row = [name]
        for quantity in quantities:
            speed = tokens[quantity] / torch.tensor(times[quantity]).median().item()
            row += [f"{speed:.1f}", cell(ratio(times[quantity], seconds["base"][quantity]))]
        over = "–"
        if "empty-hook" in seconds and name not in ("base", "empty-hook"):
            over = cell(ratio(times["decode"], seconds["base"]["decode"], seconds["empty-hook"]["decode"]), 1, 100)
        row.append(over)
        if section["mode"] == "eager":
            row.append(f"{(facts[name]['operations'] - facts['base']['operations']) / section['layers']:.1f}")
        else:
            row.append(str(facts[name]["graphs"]))
        lines.append("| " + " | ".join(row) + " |")
    lines += [f"\nLeft out: {name}: {reason}" for name, reason in section["skipped"].items()]
    return "\n".join([*lines, *floor_lines(section)])


def floor_lines(section: dict[str, Any]) -> list[str]:
    """The floor in words; bytes turn into time at the bandwidth that the base's decoding shows."""
    if not section["seconds"]:
        return []
    seconds = {name: median_interval(times).median for name, times in section["seconds"]["base"].items()}
    bandwidth = section["floor"]["decode"]["model_bytes"] / seconds["decode"]
    lines = ["\nFloor of the rank-1 edit of every layer, as shares of the base:"]
    for phase, work in section["floor"].items():
        share = work["edit_bytes"] / bandwidth / seconds[phase]
        lines.append(f"- {phase}: {work['operations']:.3%} in operations, {share:.3%} in time to move its bytes")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="135m", help="shape of the random model")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda", "cuda:1", ...')
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compiled models with static caches, not eager ones")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows; a table for each number")
    parser.add_argument("--prompt-length", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens decoded after it")
    parser.add_argument("--rounds", type=int, default=30, help="times that every variant is timed")
    parser.add_argument("--generate", action="store_true", help="also time generate() as a whole (eager only)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU; default: torch's own")
    parser.add_argument("--only", choices=BUILDERS, nargs="+", metavar="VARIANT", help=", ".join(BUILDERS))
    parser.add_argument("--output", type=Path, help="JSON file for all single times")
    args = parser.parse_args(arguments)
    for name in ("prompt_length", "new_tokens", "rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if min(args.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(args.batch)}.")
    args.only = list(dict.fromkeys(["base", *(args.only or BUILDERS)]))
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print tables as they come, write and return the results."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    base = build_model(args.model, args.device, getattr(torch, args.dtype))
    parameters = sum(parameter.numel() for parameter in base.parameters())
    results = {"machine": machine(args.device), "settings": settings, "parameters": parameters, "sections": []}
    print(json.dumps({name: value for name, value in results.items() if name != "sections"}, indent=1))
    for batch in args.batch:
        section = measure(base, "compiled" if args.compile else "eager", batch, args)
        results["sections"].append(section)
        print("\n" + table(section, args.prompt_length, args.new_tokens), flush=True)
        if args.output is not None:
            write_json(args.output, results)
    return results


if __name__ == "__main__":
    ours_left_out = {name for section in main()["sections"] for name in section["skipped"]} & set(VARIANTS)
    if ours_left_out:
        sys.exit(f"Left out though it needs no further package: {', '.join(sorted(ours_left_out))}.")
