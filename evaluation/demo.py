"""`psr demo`: the persona benchmark on the embedded model, one trait after another, and its best adapter."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from peft import PeftModel
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from peft_psr.base_model.loading import EMBEDDED, load_tokenizer, model_path
from peft_psr.evaluation.benchmarks.cell import Cell, Result
from peft_psr.evaluation.benchmarks.faithfulness.benchmark import reworded_prompts
from peft_psr.evaluation.benchmarks.persona.benchmark import check_persona, persona_cells
from peft_psr.evaluation.benchmarks.persona.recipe import PersonaRecipe, demo_recipe
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.inspection.shading import shaded_answer
from peft_psr.evaluation.measures.faithfulness import intervention_strength, relative_rmse
from peft_psr.evaluation.measures.neutral import instruction_of
from peft_psr.evaluation.measures.scoring import SteeringScore
from peft_psr.evaluation.methods.method import PROMPT
from peft_psr.evaluation.methods.registry import METHODS
from peft_psr.evaluation.reports.plots import rmse_by_layer, strength_by_token, trait_against_coherence
from peft_psr.files import as_png, check_new_folder, write_json, write_whole
from peft_psr.hub.facts import AdapterFacts, package_versions
from peft_psr.hub.model_card import write_model_card
from peft_psr.positions import encode_chat
from peft_psr.prompts.conversations import last_text
from peft_psr.prompts.messages import Message
from peft_psr.tiny_chat import questions, tiny_chat_path
from peft_psr.training import PromptPair, sample_completions
from peft_psr.training.judges.base import judge_answers
from peft_psr.training.passes.branches import unedited


Bench = Workbench[PersonaRecipe]


def run_demo(
    traits: list[str],
    model: str,
    output: Path,
    seed: int = 0,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, dict]:
    """Train, save, reload and measure every method on every trait.

    Writes, for each trait, `<output>/<trait>/` (or `<output>/` for a single one) with `adapter/` (the best adapter),
    `results.json`, which is returned by trait, and three figures. `model` is a folder of the embedded model, or of one
    rebuilt by `scripts/build_tiny_chat.py`; `quick` is for fewer samples and rougher numbers. A seed makes the run
    repeatable on the same machine.

    Raises:
        FileExistsError, NotADirectoryError: `output` is not empty, or a file.
        ValueError: an unknown trait, or a model that does not know the grammar's words.
    """
    console = console or Console()
    name = EMBEDDED if model == tiny_chat_path() else model
    recipes = {trait: demo_recipe(trait, name, seed, quick) for trait in traits}
    check_new_folder(output)
    check_vocabulary(load_tokenizer(name), name)
    output.mkdir(parents=True, exist_ok=True)
    results = {}
    for trait, recipe in recipes.items():
        folder = output if len(traits) == 1 else output / trait
        folder.mkdir(exist_ok=True)
        with TemporaryDirectory() as work:
            bench = Workbench(recipe, Path(work) / "run", "persona", console)
            results[trait] = _run_trait(bench, trait, folder)
    if quick:
        console.print("[yellow]--quick: few samples, so these numbers are rough (several points either way).[/]")
    return results


def check_vocabulary(processing_class: PreTrainedTokenizerBase, model: str) -> None:
    """Raise `ValueError` if the tokenizer does not know the grammar's words."""
    unknown = processing_class.unk_token_id
    for question in questions("all"):
        ids = processing_class(question.text, add_special_tokens=False)["input_ids"]
        if unknown is None or unknown in ids:
            raise ValueError(
                f"The tokenizer at {model!r} does not know the words of {question.text!r}. `psr demo` needs the "
                "embedded model (leave --model out) or one made by scripts/build_tiny_chat.py."
            )


def _run_trait(bench: Bench, trait: str, folder: Path) -> Result:
    start, console, recipe = time.perf_counter(), bench.console, bench.recipe
    console.rule(f"[bold]{trait}")
    check_persona(bench)
    with bench.open():
        cells, _ = persona_cells(bench)
    (name,) = recipe.models
    triplets, held_out = bench.triplets(name, trait), bench.held_out(name, trait)
    model, processing_class = bench.load(name)
    layer = recipe.fit_settings(model.config.num_hidden_layers, 0).layer
    console.print(
        f"{len(triplets)} triplets to train on, {len(held_out)} held out; single-layer methods edit layer {layer}"
    )
    console.print(_table(trait, cells))
    for cell in cells:
        if dead := cell.result.get("dead_gates"):
            console.print(f"[yellow]{cell.method}: dead gates: {', '.join(dead)}[/]")

    best = max((cell for cell in cells if cell.has_adapter), key=_merit)
    _save(bench, cells, best, folder / "adapter")
    steered = PeftModel.from_pretrained(model, folder / "adapter").eval()
    _show_answers(bench, steered, processing_class, best)
    _draw(bench, steered, processing_class, cells, best, folder)
    steered.unload()
    result = {
        "schema": 1,
        "model": "tiny_chat" if name == EMBEDDED else name,
        "trait": trait,
        "seed": recipe.seed,
        "versions": package_versions() | {"python": platform.python_version()},
        "sizes": {
            "triplets": len(triplets),
            "held_out": len(held_out),
            "answers_per_score": cells[0].result["alpha1"]["completions"],
        },
        "single_layer": layer,
        "best": best.method,
        "rows": [as_row(cell) for cell in cells],
    }
    write_json(folder / "results.json", result)
    console.print(_how_to_load(folder, name, best), soft_wrap=True)
    console.print(f"{trait}: {time.perf_counter() - start:.0f} s; results and figures in {folder}")
    return result


def as_row(cell: Cell) -> dict[str, Any]:
    """A cell for `results.json`; a value that could not be had is null and `why` says why."""
    found, why = cell.result, {}

    def value(name: str, number: float | None, reason: str | None = None) -> float | None:
        if not cell.has_adapter or reason is not None:
            why[name] = reason or "no adapter"
        return None if number is None else round(number, 4)

    row: dict[str, Any] = {"method": cell.method, "alpha1": _rounded(found["alpha1"])}
    for what, source in (("ta", "trait"), ("alpha", "alpha")):
        for place in ("c80", "cp"):
            at = found.get(place, {})
            row[f"{what}_{place}"] = value(f"{what}_{place}", at.get(source), at.get("why"))
    for name in ("prompt_recovery", "train_seconds", "adapter_bytes"):
        row[name] = value(name, found.get(name))
    row |= {
        "relative_rmse": {layer: round(rmse, 4) for layer, rmse in found.get("relative_rmse", {}).items()},
        "dead_gates": found.get("dead_gates", []),
        "curve": [[point["alpha"], round(point["trait"], 3), round(point["coherence"], 3)] for point in _curve(cell)],
    }
    return {**row, "why": why} if why else row


def _rounded(score: Mapping[str, float]) -> dict[str, float]:
    return {name: round(score[name], 4) for name in ("trait", "coherence")}


def _curve(cell: Cell) -> list[Mapping[str, Any]]:
    return cell.result.get("curve", [cell.result["alpha1"]])


def _merit(cell: Cell) -> tuple[float, float]:
    """What makes an adapter the best: trait at the prompt's own coherence, then prompt recovery."""
    trait = cell.result["cp"]["trait"]
    return -1.0 if trait is None else trait, cell.result["prompt_recovery"]


def _score(cell: Cell) -> SteeringScore:
    return SteeringScore(**cell.result["alpha1"])


def _save(bench: Bench, cells: Sequence[Cell], best: Cell, folder: Path) -> None:
    """Save the adapter with its model card, at the strength where its coherence is the prompt's, if that was found."""
    found = best.result["cp"]
    calibrated = found["alpha"] is not None and found["why"] is None
    alpha = found["alpha"] if calibrated else 1.0
    with bench.fitted(replace(best, result={})) as fitted:
        fitted.model.set_alpha(round(alpha, 4))
        fitted.model.active_peft_config.base_model_name_or_path = model_path(best.model)
        fitted.model.save_pretrained(str(folder))
    write_model_card(folder, _facts(bench, cells, best, alpha, calibrated), overwrite=True)


def _facts(bench: Bench, cells: Sequence[Cell], best: Cell, alpha: float, calibrated: bool) -> AdapterFacts:
    recipe, method, pairs = bench.recipe, METHODS[best.method], bench.pairs("train")[best.trait]
    plain, prompted = (_score(cell).for_card() for cell in cells[:2])
    curve = [SteeringScore(**point).for_card() for point in _curve(best)]
    asked = {last_text(pair.prompt): None for pair in bench.pairs("test")[best.trait]}
    return AdapterFacts(
        trait=best.trait,
        instructions=tuple(dict.fromkeys(_instruction(pair) for pair in pairs))[:2],
        question=next(iter(asked)),
        base_model="the toy chat model inside peft-psr (1.35 M parameters)",
        data="the base model's own answers to everyday questions with the instruction in its prompt, "
        "filtered by the judge",
        triplets=len(bench.triplets(best.model, best.trait)),
        objective=f"{method.objective}; start: {method.start}",
        seed=recipe.seed,
        versions=package_versions(),
        judge="the grammar that the toy model was trained on",
        evaluation=f"{len(asked)} held-out questions, {recipe.score_draws} answers each",
        plain=plain,
        prompted=prompted,
        steered=next((point for point in curve if point.alpha == alpha), None),
        calibration="where coherence is the prompt's" if calibrated else "that of training",
        curve=tuple(curve),
        prompt_recovery=best.result["prompt_recovery"],
        limits=("The base model is a toy: no number here says anything about a large model.",),
    )


_COLUMNS = {
    "trait": ("alpha1", "trait", 1),
    "coh.": ("alpha1", "coherence", 1),
    "TA@C80": ("c80", "trait", 1),
    "TA@Cp": ("cp", "trait", 1),
    "α@C80": ("c80", "alpha", 2),
    "α@Cp": ("cp", "alpha", 2),
    "recov.": ("", "prompt_recovery", 2),
    "sec.": ("", "train_seconds", 1),
    "bytes": ("", "adapter_bytes", 0),
}
"""{column: where in a cell's result its number is, and digits}."""


def _table(trait: str, cells: Sequence[Cell]) -> Table:
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
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for cell in cells:
        found = {"": cell.result, **cell.result}
        numbers = [number(found.get(at, {}).get(name), digits) for at, name, digits in _COLUMNS.values()]
        table.add_row(cell.method, *numbers, end_section=cell.method == PROMPT)
    table.caption = (
        "trait, coh. (coherence): 0-100, at strength α = 1; TA@C80, TA@Cp: trait where coherence is 80 or the "
        "prompt's, α@ the strength there; recov.: prompt recovery, 1 = prompt replaced; sec.: to train; '-': see "
        "`why` in results.json"
    )
    return table


def _instruction(pair: PromptPair) -> str:
    return instruction_of(pair, "system")


def _show_answers(bench: Bench, steered: PeftModel, processing_class: PreTrainedTokenizerBase, best: Cell) -> None:
    recipe, console, pairs = bench.recipe, bench.console, bench.pairs("test")[best.trait]
    pair = pairs[recipe.seed % len({last_text(pair.prompt) for pair in pairs})]  # of the first instruction
    settings: dict[str, Any] = {"max_new_tokens": recipe.max_new_tokens, "seed": recipe.seed}
    with unedited(steered):
        plain, with_prompt = (
            sample_completions(steered, processing_class, [prompt], **settings)[0].text
            for prompt in (pair.prompt, pair.steered_prompt)
        )
    answer = sample_completions(steered, processing_class, [pair.prompt], **settings)[0].text
    console.print(f"\n[bold]{last_text(pair.prompt)}")
    console.print("[dim]plain   [/]", plain, soft_wrap=True)
    console.print(f"[dim]prompted[/] [dim]({_instruction(pair)})[/]", with_prompt, soft_wrap=True)
    console.print(f"[dim]steered [/] [dim]({best.method}, no prompt; darker: gates open wider)[/]", soft_wrap=True)
    encoded = encode_chat(processing_class, [cast(list[Message], pair.prompt)])
    answer_ids = processing_class(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    shaded = shaded_answer(steered, processing_class, encoded, answer_ids, encoding=console.encoding)
    console.print(shaded, "\n", soft_wrap=True)


def _draw(
    bench: Bench,
    steered: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    best: Cell,
    folder: Path,
) -> None:
    trait, methods = best.trait, [cell for cell in cells if cell.has_adapter]
    plain, prompted = (_score(cell) for cell in cells[:2])
    curves = {cell.method: [SteeringScore(**point) for point in _curve(cell)] for cell in methods}
    figures = {"trait_coherence.png": trait_against_coherence(curves, plain, prompted, trait)}
    held_out = bench.held_out(best.model, trait)
    reworded = reworded_prompts(held_out, bench.pairs("test")[trait])
    rmse = {cell.method: cell.result["relative_rmse"] for cell in methods}
    rmse["reworded prompt"] = relative_rmse(steered, held_out, processing_class, reworded_prompts=reworded)
    figures["rmse_by_layer.png"] = rmse_by_layer(rmse, trait)
    scores = judge_answers(
        bench.judge(trait), [row["prompt"] for row in held_out], [row["completion"] for row in held_out]
    )
    full = (row for row, score in zip(held_out, scores, strict=True) if (score.trait or 0) >= 99)
    tokens, by_prompt, by_adapter = intervention_strength(
        steered, next(full, held_out[0]), processing_class, alpha=steered.active_peft_config.alpha
    )
    figures["strength_by_token.png"] = strength_by_token(tokens, by_prompt, by_adapter, best.method)
    for name, figure in figures.items():
        write_whole(folder / name, as_png(figure))


def _how_to_load(folder: Path, model: str, best: Cell) -> str:
    tokenizer = "peft_psr.tiny_chat_path()" if model == EMBEDDED else repr(model)
    return (
        f"\n[bold]Load the best adapter ({best.method}):[/]\n\n"
        "  import peft_psr\n"
        "  from peft import AutoPeftModelForCausalLM\n"
        "  from transformers import AutoTokenizer\n"
        f"  model = AutoPeftModelForCausalLM.from_pretrained({str(folder / 'adapter')!r}).eval()\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n"
    )
