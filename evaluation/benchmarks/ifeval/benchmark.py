"""`psr evaluate ifeval`: instructions followed without being in the prompt, by IFEval's published checkers.

    none                the bare prompt
    <method>            the bare prompt, with an adapter of the instruction's type
    prompt              the prompt with its instruction
    <method> + prompt   both

An adapter is made from triplets of its type and tested on prompts of that type that it was not trained on: the prompts
are parted into folds, and each is answered with an adapter made from the others' triplets. Sources: IFEval (arXiv
2311.07911) for instructions and checkers; Stolfo et al. (arXiv 2410.12877) for the prompts without their instruction;
arXiv 2605.03907 for the protocol: strength 1, no search.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from peft_psr.evaluation.benchmarks.cell import Cell, Result
from peft_psr.evaluation.benchmarks.workbench import Workbench
from peft_psr.evaluation.measures.strength import sample_steered
from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.report import Report
from peft_psr.files import digest
from peft_psr.training import PromptPair, Triplet
from peft_psr.training.judges.base import JudgeScores, check_answered, judge_answers
from peft_psr.training.judges.ifeval import IFEvalJudge
from peft_psr.training.runs.triplets.assembly import prompt_pairs
from peft_psr.training.runs.triplets.run import NothingKeptError
from peft_psr.training.sources.ifeval import read_ifeval

from .recipe import IFEvalRecipe
from .report import WITH_PROMPT, ifeval_report
from .scoring import ScoredAnswer, bare_text, rows_apart, split_folds


TRAIN_DATA = "train_data"


@dataclass(frozen=True)
class Fold:
    """Prompts that one adapter is tested on, and triplets of other bare prompts that it is made from, if one is made.

    The name is empty where a type is not parted.
    """

    name: str
    tested: list[PromptPair]
    triplets: list[Triplet] = field(default_factory=list)


def check_ifeval(bench: Workbench[IFEvalRecipe]) -> None:
    """Raises what can be known to be wrong before any long work, as `Workbench.check` and besides.

    Raises:
        FileNotFoundError: `data` or `train_data` is not there, or NLTK's punkt_tab, which some checkers need.
        ImportError: the extra `ifeval` is not installed.
        ValueError: no type can be tested on prompts apart from those it is trained on, or an instruction has no
            checker or not what its checker takes.
    """
    bench.check()
    recipe = bench.recipe
    if recipe.train_data:
        IFEvalJudge(_training_pairs(recipe))
    folds, left_out = _testable(bench)
    if not folds:
        raise ValueError("No type can be tested: " + " ".join(left_out.values()))


def run_ifeval(bench: Workbench[IFEvalRecipe]) -> Report:
    """Answers every prompt with every model, method and seed; `ValueError` if no type can be trained on, for one."""
    recipe = bench.recipe
    plans = {model: _plan(bench, model) for model in recipe.models}
    left_out = {model: reasons for model, (_, reasons) in plans.items()}
    if not any(folds for folds, _ in plans.values()):
        reasons = [f"{model}: {reason}" for model, found in left_out.items() for reason in found.values()]
        raise ValueError("No type can be tested: " + " ".join(reasons))
    asked = [
        each
        for model, (by_type, _) in plans.items()
        for trait, folds in by_type.items()
        for each in _cells_of(recipe, model, trait, folds)
    ]
    bench.expect(len(asked))
    checkers = IFEvalJudge([pair for pairs in bench.pairs("test").values() for pair in pairs])
    folds = {cell.more["content"]: fold for cell, fold in asked}
    answers: list[ScoredAnswer] = []
    adapters: list[dict[str, Any]] = []
    for cell in bench.cells([cell for cell, _ in asked], partial(_measure, bench, checkers, folds)):
        fold, alpha = cell.more["fold"], cell.more.get("alpha")
        known = {"model": cell.model, "trait": cell.trait, "seed": cell.seed, "fold": fold, "alpha": alpha}
        for answer in cell.result["answers"]:
            said = {name: value for name, value in answer.items() if name != "prompted"}
            condition = _condition(recipe, cell.method, alpha, answer["prompted"])
            answers.append(ScoredAnswer(**known, condition=condition, **said))
        if "adapter" in cell.result:
            adapters.append({**known, "method": cell.method, **cell.result["adapter"]})
    read = read_ifeval(recipe.data or "", recipe.traits or None)
    unchanged = [pair.id for pair in read if pair.prompt == pair.steered_prompt]
    return ifeval_report(recipe, answers, adapters, bench.pairs("test"), left_out, unchanged)


def _condition(recipe: IFEvalRecipe, method: str, alpha: float | None, prompted: bool) -> str:
    """The row of the tables."""
    if alpha is None:
        return method
    strength = "" if len(recipe.alphas) == 1 else f", alpha {alpha:g}"
    return method + strength + (WITH_PROMPT if prompted else "")


# ---------------------------------------------------------------- what is tested and what trained on


def _training_pairs(recipe: IFEvalRecipe) -> list[PromptPair]:
    other = recipe.triplet_recipe(recipe.models[0], recipe.traits).model_copy(update={"data": recipe.train_data})
    return prompt_pairs(other)


def _testable(bench: Workbench[IFEvalRecipe]) -> tuple[dict[str, list[Fold]], dict[str, str]]:
    """The folds of the types that have prompts enough, and why others are left out."""
    recipe = bench.recipe
    trained = {pair.trait for pair in _training_pairs(recipe)} if recipe.train_data and recipe.methods else set()
    folds: dict[str, list[Fold]] = {}
    left_out: dict[str, str] = {}
    for trait, pairs in bench.pairs("test").items():
        if not recipe.methods:
            folds[trait] = [Fold("", pairs)]
        elif recipe.train_data:
            if trait in trained:
                folds[trait] = [Fold("", pairs)]
            else:
                left_out[trait] = f"{trait} has no prompts in train_data."
        else:
            try:
                parts = split_folds(pairs, recipe.folds, recipe.seed)
            except ValueError as error:
                left_out[trait] = f"{trait}: {error}"
                continue
            folds[trait] = [Fold(f"fold{i}", part) for i, part in enumerate(parts)]
    return folds, left_out


def _plan(bench: Workbench[IFEvalRecipe], model: str) -> tuple[dict[str, list[Fold]], dict[str, str]]:
    """As `_testable`, with each fold's triplets, drawn now if they are not there."""
    planned, left_out = _testable(bench)
    if not bench.recipe.methods:
        return planned, left_out
    folds: dict[str, list[Fold]] = {}
    train_data = bench.recipe.train_data
    drawing = bench.beside(TRAIN_DATA, data=train_data) if train_data else bench
    for trait, parts in planned.items():
        triplets = _triplets(drawing, model, trait)
        found = [Fold(part.name, part.tested, rows_apart(triplets, part.tested)) for part in parts]
        if all(part.triplets for part in found):
            folds[trait] = found
        elif not triplets:
            left_out[trait] = f"{trait}: none of the model's answers under the instruction was kept to train on."
        else:
            left_out[trait] = (
                f"{trait}: all {len(triplets)} triplets are on prompts that one adapter is to be tested on, so none "
                "is left to make it from."
            )
    return folds, left_out


def _triplets(bench: Workbench[IFEvalRecipe], model: str, trait: str) -> list[Triplet]:
    """What is kept of the model's prompted answers to a type's prompts: nothing, if it can't follow them."""
    try:
        return bench.triplets(model, trait)
    except NothingKeptError:
        return []


# ---------------------------------------------------------------- measuring


def _cells_of(recipe: IFEvalRecipe, model: str, trait: str, folds: Sequence[Fold]) -> list[tuple[Cell, Fold]]:
    """What is measured of a type, and on which prompts."""
    every = Fold("", [pair for fold in folds for pair in fold.tested])
    seeds = recipe.seeds if recipe.answer_temperature else (None,)
    plain = [(method, seed, None, every) for method in (PLAIN, PROMPT) for seed in seeds]
    steered = [
        (method, seed, alpha, fold)
        for alpha in recipe.alphas
        for method in recipe.methods
        for seed in recipe.seeds
        for fold in folds
    ]
    given = [(name, seed, alpha, every) for alpha in recipe.alphas for name in recipe.adapters for seed in seeds]
    found = []
    for method, seed, alpha, fold in (*plain, *steered, *given):
        source = recipe.adapters.get(method)
        content = digest([[asdict(pair) for pair in fold.tested], fold.triplets, source], 16)
        strength = {} if alpha is None else {"alpha": alpha}
        found.append((Cell(model, trait, method, seed, {**strength, "fold": fold.name, "content": content}), fold))
    return found


def _measure(bench: Workbench[IFEvalRecipe], checkers: IFEvalJudge, folds: Mapping[str, Fold], cell: Cell) -> Result:
    """The answers to a fold's prompts, judged: with an adapter, those to the bare prompts and to the whole ones."""
    fold = folds[cell.more["content"]]
    if not cell.has_adapter:
        base, _ = bench.load(cell.model)
        return {"answers": _answers(bench, checkers, fold, cell, base, [cell.method == PROMPT])}
    with bench.fitted(cell, fold.triplets, fold.name or TRAIN_DATA) as fitted:
        return {
            "answers": _answers(bench, checkers, fold, cell, fitted.model, [False, True]),
            "adapter": {
                "prompts": len(fold.tested),
                "triplets": len(fold.triplets),
                "seconds": fitted.seconds,
                "dead_gates": fitted.dead_gates,
                "notes": fitted.notes,
            },
        }


def _answers(
    bench: Workbench[IFEvalRecipe],
    checkers: IFEvalJudge,
    fold: Fold,
    cell: Cell,
    model: PreTrainedModel | PeftModel,
    prompted: Sequence[bool],
) -> list[dict[str, Any]]:
    """Answers to a fold's prompts with the instruction, without it, or to both, and what is said of them."""
    recipe, alpha = bench.recipe, cell.more.get("alpha")
    asked = [(pair, instructed) for instructed in prompted for pair in fold.tested]
    completions = sample_steered(
        model,
        bench.load(cell.model)[1],
        [pair.steered_prompt if instructed else pair.prompt for pair, instructed in asked],
        None if alpha is None else [alpha] * len(asked),
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.answer_temperature,
        batch_size=recipe.batch_size,
        seed=cell.seed or 0,
    )
    pairs, answers = [pair for pair, _ in asked], [completion.answer for completion in completions]
    scores = [JudgeScores(None, None)] * len(asked)
    if recipe.coherence_judge:
        judge = cast(IFEvalJudge, bench.judge(pairs[0].trait)).coherence
        assert judge is not None
        scores = judge_answers(judge, [pair.prompt for pair in pairs], answers)
        check_answered([score.failure for score in scores])
    return [
        {
            "pair": pair.id,
            "question": bare_text(pair.prompt),
            "prompted": instructed,
            "answer": completion.text,
            "truncated": completion.truncated,
            "strict": followed.strict,
            "loose": followed.loose,
            "coherence": score.coherence,
        }
        for (pair, instructed), completion, followed, score in zip(
            asked, completions, checkers.followed(pairs, [answer or "" for answer in answers]), scores, strict=True
        )
    ]
