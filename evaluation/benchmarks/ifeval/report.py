"""The report of `psr evaluate ifeval`: accuracy by family and type, bars by type, samples, and what to know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.plots import panel_grid
from peft_psr.evaluation.reports.report import Column, Report, SideBySide, Table
from peft_psr.training import PromptPair
from peft_psr.training.data.by_trait import folder_name

from .recipe import IFEvalRecipe
from .scoring import ScoredAnswer, accuracy, by_condition, coherence, family


WITH_PROMPT = " + prompt"
"""Behind a method's name: the instruction is in the prompt as well."""
PANELS_A_ROW = 4
_NO_JUDGE = "the recipe names no coherence_judge"


def ifeval_report(
    recipe: IFEvalRecipe,
    answers: Sequence[ScoredAnswer],
    adapters: Sequence[Mapping[str, Any]],
    pairs: Mapping[str, Sequence[PromptPair]],
    left_out: Mapping[str, Mapping[str, str]],
    unchanged: Sequence[str],
) -> Report:
    """Tables, figures, samples and notes of all answers.

    `adapters`: what was made or given: model, trait, method, seed, alpha, fold, and what was found on the way.
    `pairs`: {type: its prompts}. `left_out`: {model: {type: why it is not tested}}. `unchanged`: prompts of the data
    that say the same without their instruction, and are not asked.
    """
    why = None if recipe.coherence_judge else _NO_JUDGE
    tables: list[Table] = []
    samples: list[SideBySide] = []
    figures, summary = {}, {}
    models = list(dict.fromkeys(answer.model for answer in answers))
    for model in models:
        of_model = [answer for answer in answers if answer.model == model]
        tables += _tables(model, of_model, why)
        samples += _samples(of_model, f"{model}: " if len(models) > 1 else "")
        figures[f"accuracy_by_type_{folder_name(model)}"] = (
            accuracy_by_type(of_model, model),
            "Share of prompts whose instruction is followed, strictly; lines are 95 % intervals over bare prompts.",
        )
        summary[model] = {
            condition: _numbers(some, recipe.seeds, why) for condition, some in by_condition(of_model).items()
        }
    return Report(
        title="IFEval without the instruction in the prompt",
        description=_description(recipe, answers),
        tables=tuple(tables),
        results={
            "benchmark": "ifeval",
            "recipe": recipe.model_dump(mode="json"),
            "accuracy": summary,
            "left_out": {model: dict(reasons) for model, reasons in left_out.items()},
            "adapters": [dict(adapter) for adapter in adapters],
            "answers": [asdict(answer) for answer in answers],
        },
        figures=figures,
        samples=tuple(samples),
        notes=_notes(recipe, answers, adapters, pairs, left_out, unchanged),
    )


def _numbers(answers: Sequence[ScoredAnswer], seeds: Sequence[int], why: str | None) -> dict[str, Any]:
    """Of one condition: over all prompts, by family, by type, and by seed."""

    def of(some: Sequence[ScoredAnswer]) -> dict[str, Any]:
        return {
            "strict": asdict(accuracy(some, "strict")),
            "loose": asdict(accuracy(some, "loose")),
            "coherence": asdict(coherence(some, why)),
            "prompts": len({answer.pair for answer in some}),
        }

    groups: dict[str, Callable[[ScoredAnswer], Any]] = {
        "families": lambda answer: family(answer.trait),
        "types": lambda answer: answer.trait,
    }
    if any(answer.seed is not None for answer in answers):
        groups["seeds"] = lambda answer: str(answer.seed)
    return {
        "all": of(answers),
        **{
            name: {value: of([a for a in answers if key(a) == value]) for value in dict.fromkeys(map(key, answers))}
            for name, key in groups.items()
        },
    }


def _description(recipe: IFEvalRecipe, answers: Sequence[ScoredAnswer]) -> str:
    prompts, types = len({answer.pair for answer in answers}), len({answer.trait for answer in answers})
    drawn = (
        "the likeliest token each time"
        if not recipe.answer_temperature
        else f"sampled at temperature {recipe.answer_temperature:g}"
    )
    if not recipe.methods:
        made = "No adapter was made here."
    elif recipe.train_data:
        made = "An adapter is made for each type, from triplets of other prompts (train_data)."
    else:
        made = (
            f"The prompts of a type are parted into {recipe.folds} folds, equal bare prompts together; a fold is "
            "answered with an adapter made from triplets of the others, so no adapter has seen what it is tested on."
        )
    return (
        f"{prompts} prompts of {types} instruction types, one answer each (for each seed), {drawn}, at most "
        f"{recipe.max_new_tokens} tokens. 'none' and the methods are given the prompt without its instruction, "
        f"'prompt' and 'method{WITH_PROMPT}' with it. {made} Strength {', '.join(f'{a:g}' for a in recipe.alphas)}, "
        "not searched for. Verdicts are those of the published checkers: strict on the answer as it stands, loose "
        "also without first line, last line or asterisks. Intervals are 95 % bootstrap intervals over bare prompts, "
        "all seeds of a prompt together."
    )


def _notes(
    recipe: IFEvalRecipe,
    answers: Sequence[ScoredAnswer],
    adapters: Sequence[Mapping[str, Any]],
    pairs: Mapping[str, Sequence[PromptPair]],
    left_out: Mapping[str, Mapping[str, str]],
    unchanged: Sequence[str],
) -> tuple[str, ...]:
    notes = [f"Left out for {model}: {reason}" for model, reasons in left_out.items() for reason in reasons.values()]
    if unchanged:
        notes.append(f"Not asked, as the data have them with the instruction still there: {', '.join(unchanged)}.")
    tested = dict.fromkeys(answer.trait for answer in answers)
    various = [trait for trait in tested if len({str(pair.metadata["kwargs"]) for pair in pairs[trait]}) > 1]
    if various and len(recipe.methods) + len(recipe.adapters):
        notes.append(
            "An adapter is of a whole type and is not told which word, number, phrase or language one prompt asks "
            f"for. These differ in {', '.join(various)}: without the prompt, an adapter can do what all of them "
            "share, not what one asks for."
        )
    if recipe.adapters:
        notes.append(
            f"{', '.join(recipe.adapters)}: given, not made here; whether made from the prompts tested is not known."
        )
    cut = sum(answer.truncated for answer in answers)
    if cut:
        notes.append(f"{cut} of {len(answers)} answers were cut off at {recipe.max_new_tokens} tokens and judged so.")
    unclear = sum(answer.coherence is None for answer in answers)
    if recipe.coherence_judge and unclear:
        notes.append(
            f"Coherence: the judge gave no usable score for {unclear} of {len(answers)} answers; means are over the "
            "others."
        )
    at_first = [adapter for adapter in adapters if adapter["alpha"] == recipe.alphas[0]]
    dead = sum(bool(adapter["dead_gates"]) for adapter in at_first)
    if dead:
        notes.append(f"{dead} of {len(at_first)} adapters have layers whose gates never open.")
    return tuple(notes)


def short_names(traits: Sequence[str]) -> dict[str, str]:
    """{type: what heads its column}: without its group, where that tells them apart."""
    short = {trait: " + ".join(name.partition(":")[2] or name for name in trait.split(" + ")) for trait in traits}
    return {trait: trait if list(short.values()).count(name) > 1 else name for trait, name in short.items()}


def _tables(model: str, answers: Sequence[ScoredAnswer], why: str | None) -> list[Table]:
    """The summary, and accuracy by family and by type, strict and loose."""
    conditions = by_condition(answers)
    summary = Table(
        f"IFEval without the instruction in the prompt: {model}",
        (
            Column("strict", "% of prompts whose instruction the answer follows, as it stands", best="high"),
            Column("loose", "% of prompts, also without first line, last line or asterisks", best="high"),
            Column("coherence", "judged against the bare prompt, 0-100", best="high"),
            Column("cut off", "% of answers that reached the token limit", best="low"),
        ),
        {
            condition: {
                "strict": accuracy(some, "strict"),
                "loose": accuracy(some, "loose"),
                "coherence": coherence(some, why),
                "cut off": accuracy(some, "truncated"),
            }
            for condition, some in conditions.items()
        },
    )
    names = short_names(list(dict.fromkeys(answer.trait for answer in answers)))
    groups: dict[str, Callable[[ScoredAnswer], str]] = {
        "family": lambda answer: family(answer.trait),
        "type": lambda answer: names[answer.trait],
    }
    tables = [
        _accuracy_table(f"{measure.capitalize()} accuracy by {what}: {model}", conditions, group, measure)
        for what, group in groups.items()
        for measure in ("strict", "loose")
    ]
    return [summary, *tables]


def _accuracy_table(
    title: str,
    conditions: Mapping[str, Sequence[ScoredAnswer]],
    group: Callable[[ScoredAnswer], str],
    measure: str,
) -> Table:
    prompts: dict[str, set[str]] = {}
    for answers in conditions.values():
        for answer in answers:
            prompts.setdefault(group(answer), set()).add(answer.pair)
    return Table(
        title,
        tuple(Column(name, f"% of {len(pairs)} prompts", best="high") for name, pairs in prompts.items()),
        {
            condition: {name: accuracy([a for a in some if group(a) == name], measure) for name in prompts}
            for condition, some in conditions.items()
        },
    )


def accuracy_by_type(answers: Sequence[ScoredAnswer], model: str) -> Figure:
    """One model's strict accuracy with its interval, a panel for each type; hatched where the prompt is there too."""
    conditions = by_condition(answers)
    names = short_names(list(dict.fromkeys(answer.trait for answer in answers)))
    methods = list(dict.fromkeys(c.removesuffix(WITH_PROMPT) for c in conditions if c not in (PLAIN, PROMPT)))
    colours = {PLAIN: "#bbbbbb", PROMPT: "#222222"} | {name: f"C{i}" for i, name in enumerate(methods)}
    columns = min(PANELS_A_ROW, len(names))
    lines = -(-len(names) // columns)
    size = (2.6 + 1.9 * columns, 0.6 + lines * (0.65 + 0.19 * len(conditions)))
    figure, panels = panel_grid(len(names), columns, size)
    for axes, (trait, name) in zip(panels, names.items(), strict=True):
        values = [accuracy([a for a in some if a.trait == trait], "strict") for some in conditions.values()]
        bars = axes.barh(
            list(conditions),
            [value.mean or 0.0 for value in values],
            color=[colours[condition.removesuffix(WITH_PROMPT)] for condition in conditions],
            edgecolor="white",
            linewidth=0,
        )
        for bar, condition in zip(bars, conditions, strict=True):
            bar.set_hatch("///" if condition.endswith(WITH_PROMPT) else None)
        for place, value in enumerate(values):
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [place, place], color="#999999", linewidth=1)
        axes.set_title(name, loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set(xlim=(0, 102), xticks=(0, 50, 100))
    figure.axes[0].invert_yaxis()
    figure.suptitle(f"Prompts whose instruction is followed (%, strict): {model}", fontsize=11)
    return figure


def _samples(answers: Sequence[ScoredAnswer], before: str) -> list[SideBySide]:
    """The answers of all conditions to the first prompt of each type; of several seeds the first."""
    first: dict[str, str] = {}
    for answer in answers:
        first.setdefault(answer.trait, answer.pair)
    samples = []
    for trait, pair in first.items():
        shown: dict[str, ScoredAnswer] = {}
        for answer in answers:
            if answer.pair == pair:
                shown.setdefault(answer.condition, answer)
        samples.append(
            SideBySide(
                before + trait,
                next(iter(shown.values())).question,
                {condition: answer.answer for condition, answer in shown.items()},
                {condition: _in_words(answer) for condition, answer in shown.items()},
            )
        )
    return samples


def _in_words(answer: ScoredAnswer) -> str:
    verdict = "followed" if answer.strict else "followed loosely" if answer.loose else "not followed"
    return verdict if answer.coherence is None else f"{verdict}, coherence {answer.coherence:.0f}"
