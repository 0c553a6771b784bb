"""`psr demo`: the whole way once, on the embedded model, for one trait after another."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich import box
from rich.console import Console
from rich.table import Table

from peft_psr.base_model.loading import load_model, load_tokenizer
from peft_psr.evaluation.inspection.shading import shaded_answer
from peft_psr.evaluation.measures.faithfulness import intervention_strength, relative_rmse
from peft_psr.evaluation.methods.registry import DEMO, METHODS
from peft_psr.evaluation.reports.plots import rmse_by_layer, strength_by_token, trait_against_coherence
from peft_psr.files import as_png, check_new_folder, write_json, write_whole
from peft_psr.hub.facts import AdapterFacts, package_versions
from peft_psr.hub.model_card import write_model_card
from peft_psr.positions import encode_chat
from peft_psr.prompts.conversations import last_text
from peft_psr.tiny_chat import TRAITS, instructions, prompt_messages, questions, tiny_chat_path
from peft_psr.training import add_instruction, sample_completions
from peft_psr.training.judges.grammar import GrammarJudge
from peft_psr.training.passes.branches import unedited
from peft_psr.training.progress import Progress

from .experiment import Experiment, Outcome, Sizes, SteeringTask, as_row


MAX_NEW_TOKENS = 96
QUICK = Sizes(train_prompts=9, train_draws=1, held_out_draws=1, score_draws=2, curve=(1.0, 2.0, 4.0),
              calibration_steps=4)  # fmt: skip


def tiny_task(trait: str) -> SteeringTask:
    """A trait of the embedded model, with its grammar as judge.

    Raises:
        ValueError: no such trait.
    """
    return SteeringTask(
        name=trait,
        judge=GrammarJudge(trait),
        train_instructions=instructions(trait, "train"),
        test_instructions=instructions(trait, "test"),
        train_prompts=[prompt_messages(question.text) for question in questions("train")],
        test_prompts=[prompt_messages(question.text) for question in questions("test")],
        max_new_tokens=MAX_NEW_TOKENS,
    )


def run_demo(
    traits: list[str],
    model_path: str,
    output: Path,
    seed: int = 0,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, dict]:
    """Train, save, reload and measure every method on every trait.

    Writes, for each trait, `<output>/<trait>/` (or `<output>/` for a single one) with `adapter/` (the best adapter),
    `results.json` and three figures.

    Args:
        traits: Names of traits of the embedded model.
        model_path: Folder of the embedded model, or of one rebuilt by `scripts/build_tiny_chat.py`.
        output: An empty folder, or one to be made.
        seed: Makes the run repeatable on the same machine.
        quick: Fewer samples, rougher numbers.
        console: Where to print.

    Returns:
        {trait: what its `results.json` holds}.

    Raises:
        FileExistsError, NotADirectoryError: `output` is not empty, or a file.
        ValueError: an unknown trait, or a model that does not know the grammar's words.
    """
    console = console or Console()
    for trait in traits:
        if trait not in TRAITS:
            raise ValueError(f"No trait {trait!r}; there are: {', '.join(TRAITS)}, or 'all'.")
    check_new_folder(output)
    processing_class = load_tokenizer(model_path)
    check_vocabulary(processing_class, model_path)
    model = load_model(model_path)
    output.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if quick else Sizes()
    results = {}
    for trait in traits:
        folder = output if len(traits) == 1 else output / trait
        folder.mkdir(exist_ok=True)
        results[trait] = _run_trait(trait, model, processing_class, model_path, folder, seed, sizes, console)
    if quick:
        console.print("[yellow]--quick: few samples, so these numbers are rough (several points either way).[/]")
    return results


def check_vocabulary(processing_class, model_path: str) -> None:
    """Raise `ValueError` if the tokenizer does not know the grammar's words."""
    unknown = processing_class.unk_token_id
    for question in questions("all"):
        ids = processing_class(question.text, add_special_tokens=False)["input_ids"]
        if unknown is None or unknown in ids:
            raise ValueError(
                f"The tokenizer at {model_path!r} does not know the words of {question.text!r}. `psr demo` needs the "
                "embedded model (leave --model out) or one made by scripts/build_tiny_chat.py."
            )


def _run_trait(trait: str, model, processing_class, model_path: str, folder: Path, seed: int, sizes: Sizes,
               console: Console) -> dict:  # fmt: skip
    start = time.perf_counter()
    console.rule(f"[bold]{trait}")
    experiment = Experiment(model, processing_class, tiny_task(trait), sizes, seed)
    best: Outcome | None = None
    outcomes: list[Outcome] = []
    with Progress(trait, len(DEMO) + 1, unit="methods", shown=not console.quiet) as progress:
        progress.note = "triplets and references"
        outcomes += experiment.prepare()
        progress.advance()
        for method in (METHODS[name] for name in DEMO):

            def on_step(done: int, total: int, name: str = method.name) -> None:
                progress.note = f"training {name}, step {done} of {total}"

            steered, outcome = experiment.train(method, on_step)
            progress.note = f"measuring {method.name}"
            outcome = experiment.measure(steered, outcome)
            outcomes.append(outcome)
            if best is None or _merit(outcome) > _merit(best):
                best = outcome
                _save(steered, experiment, outcomes[0], outcome, folder / "adapter", model_path)
            steered.unload()
            progress.advance()
        progress.note = ""
    console.print(
        f"{len(experiment.triplets)} triplets to train on, {len(experiment.held_out)} held out; "
        f"single-layer methods edit layer {experiment.layer}"
    )
    assert best is not None
    console.print(_table(trait, outcomes))
    for outcome in outcomes:
        if outcome.dead_gates:
            console.print(f"[yellow]{outcome.method}: dead gates: {', '.join(outcome.dead_gates)}[/]")

    steered = PeftModel.from_pretrained(model, folder / "adapter").eval()
    _show_answers(experiment, steered, best, console)
    _draw(experiment, steered, outcomes, best, folder)
    steered.unload()
    result = {
        "schema": 1,
        "model": "tiny_chat" if model_path == tiny_chat_path() else model_path,
        "trait": trait,
        "seed": seed,
        "versions": package_versions()
        | {"python": platform.python_version()},
        "sizes": {"triplets": len(experiment.triplets), "held_out": len(experiment.held_out),
                  "answers_per_score": len(experiment.task.test_prompts) * sizes.score_draws},
        "single_layer": experiment.layer,
        "best": best.method,
        "rows": [as_row(outcome) for outcome in outcomes],
    }  # fmt: skip
    write_json(folder / "results.json", result)
    console.print(_how_to_load(folder, model_path, best), soft_wrap=True)
    console.print(f"{trait}: {time.perf_counter() - start:.0f} s; results and figures in {folder}")
    return result


def _merit(outcome: Outcome) -> tuple[float, float]:
    """What makes an adapter the best: trait at the prompt's own coherence, then prompt recovery."""
    trait = outcome.cp.trait if outcome.cp is not None and outcome.cp.trait is not None else -1.0
    return trait, outcome.recovery or 0.0


def _save(
    model: PeftModel, experiment: Experiment, plain: Outcome, outcome: Outcome, folder: Path, model_path: str
) -> None:
    """Save the adapter with its model card, at the strength where its coherence is the prompt's, if that was found."""
    found = outcome.cp.alpha if outcome.cp is not None and outcome.cp.why is None else None
    alpha = 1.0 if found is None else found
    trained = model.active_peft_config.alpha
    model.set_alpha(round(alpha, 4))
    model.active_peft_config.base_model_name_or_path = model_path
    model.save_pretrained(str(folder))
    write_model_card(folder, _facts(experiment, plain, outcome, alpha, found is not None), overwrite=True)
    model.set_alpha(trained)


def _facts(experiment: Experiment, plain: Outcome, outcome: Outcome, alpha: float, calibrated: bool) -> AdapterFacts:
    task, sizes = experiment.task, experiment.sizes
    method = METHODS[outcome.method]
    prompted = experiment.prompted
    at_alpha = next((point for point in outcome.curve if point.alpha == alpha), None)
    return AdapterFacts(
        trait=task.name,
        instructions=tuple(task.train_instructions[:2]),
        question=last_text(task.test_prompts[0]),
        base_model="the toy chat model inside peft-psr (1.35 M parameters)",
        data="the base model's own answers to everyday questions with the instruction in its prompt, "
        "filtered by the judge",
        triplets=len(experiment.triplets),
        objective=f"{method.objective}; start: {method.start}",
        seed=experiment.seed,
        versions=package_versions(),
        judge="the grammar that the toy model was trained on",
        evaluation=f"{len(task.test_prompts)} held-out questions, {sizes.score_draws} answers each",
        plain=plain.alpha1.for_card(),
        prompted=prompted.for_card(),
        steered=None if at_alpha is None else at_alpha.for_card(),
        calibration="where coherence is the prompt's" if calibrated else "that of training",
        curve=tuple(point.for_card() for point in outcome.curve),
        prompt_recovery=outcome.recovery,
        limits=("The base model is a toy: no number here says anything about a large model.",),
    )


def _table(trait: str, outcomes: list[Outcome]) -> Table:
    table = Table(
        title=f"{trait}: held-out questions, topics and instructions",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for column in ("trait", "coh.", "TA@C80", "TA@Cp", "α@C80", "α@Cp", "recov.", "sec.", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for outcome in outcomes:
        c80, cp = outcome.c80, outcome.cp
        table.add_row(
            outcome.method,
            number(outcome.alpha1.trait, 1),
            number(outcome.alpha1.coherence, 1),
            number(c80.trait if c80 else None, 1),
            number(cp.trait if cp else None, 1),
            number(c80.alpha if c80 else None, 2),
            number(cp.alpha if cp else None, 2),
            number(outcome.recovery, 2),
            number(outcome.train_seconds, 1),
            number(outcome.adapter_bytes, 0),
            end_section=outcome.method == "prompt",
        )
    table.caption = (
        "trait, coh. (coherence): 0-100, at strength α = 1; TA@C80, TA@Cp: trait where coherence is 80 or the "
        "prompt's, α@ the strength there; recov.: prompt recovery, 1 = prompt replaced; sec.: to train; '-': see "
        "`why` in results.json"
    )
    return table


def _show_answers(experiment: Experiment, steered: PeftModel, best: Outcome, console: Console) -> None:
    task, tokenizer, seed = experiment.task, experiment.processing_class, experiment.seed
    prompt = task.test_prompts[seed % len(task.test_prompts)]
    settings: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "seed": seed}
    with unedited(steered):
        plain = sample_completions(steered, tokenizer, [prompt], **settings)[0].text
        with_prompt = sample_completions(
            steered, tokenizer, [add_instruction(prompt, task.test_instructions[0])], **settings
        )[0].text
    answer = sample_completions(steered, tokenizer, [prompt], **settings)[0].text
    console.print(f"\n[bold]{last_text(prompt)}")
    console.print("[dim]plain   [/]", plain, soft_wrap=True)
    console.print(f"[dim]prompted[/] [dim]({task.test_instructions[0]})[/]", with_prompt, soft_wrap=True)
    console.print(f"[dim]steered [/] [dim]({best.method}, no prompt; darker: gates open wider)[/]", soft_wrap=True)
    encoded = encode_chat(tokenizer, [prompt])
    answer_ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    console.print(
        shaded_answer(steered, tokenizer, encoded, answer_ids, encoding=console.encoding), "\n", soft_wrap=True
    )


def _draw(experiment: Experiment, steered: PeftModel, outcomes: list[Outcome], best: Outcome, folder: Path) -> None:
    plain, prompted, *methods = outcomes
    trait = experiment.task.name
    curves = {outcome.method: outcome.curve for outcome in methods}
    figures = {"trait_coherence.png": trait_against_coherence(curves, plain.alpha1, prompted.alpha1, trait)}
    other = experiment.task.test_instructions
    swap = dict(zip(other, [*other[1:], other[0]], strict=True))
    reworded = [
        add_instruction(triplet["prompt"], swap[triplet["steered_prompt"][0]["content"]])  # type: ignore[index, arg-type]
        for triplet in experiment.held_out
    ]
    rmse = {outcome.method: outcome.rmse for outcome in methods}
    rmse["reworded prompt"] = relative_rmse(
        steered, experiment.held_out, experiment.processing_class, reworded_prompts=reworded
    )
    figures["rmse_by_layer.png"] = rmse_by_layer(rmse, trait)
    example = next((t for t in experiment.held_out if (t.get("trait_score") or 0) >= 99), experiment.held_out[0])
    tokens, by_prompt, by_adapter = intervention_strength(
        steered, example, experiment.processing_class, alpha=steered.active_peft_config.alpha
    )
    figures["strength_by_token.png"] = strength_by_token(tokens, by_prompt, by_adapter, best.method)
    for name, figure in figures.items():
        write_whole(folder / name, as_png(figure))


def _how_to_load(folder: Path, model_path: str, best: Outcome) -> str:
    tokenizer = "peft_psr.tiny_chat_path()" if model_path == tiny_chat_path() else repr(model_path)
    return (
        f"\n[bold]Load the best adapter ({best.method}):[/]\n\n"
        "  import peft_psr\n"
        "  from peft import AutoPeftModelForCausalLM\n"
        "  from transformers import AutoTokenizer\n"
        f"  model = AutoPeftModelForCausalLM.from_pretrained({str(folder / 'adapter')!r}).eval()\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n"
    )
