"""The model card of an adapter folder: README.md with the Hub's metadata, and a figure, from its facts."""

import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_psr.config import PSRConfig
from peft_psr.files import as_png, sha256, write_whole

from .adapter_config import is_hub_name, read_folder_config
from .facts import AdapterFacts


CARD_NAME = "README.md"
FIGURE_NAME = "psr_scores.png"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MARK = re.compile(r"<!-- written by peft-psr, ([0-9a-f]{16}) -->\s*\Z")
SET_BY_PEFT = {"base_model", "library_name", "pipeline_tag", "tags"}
ADDED_BY_PEFT = re.compile(r"\s*### Framework versions\s+- PEFT \S+\s*\Z")
POSITIONS = {
    "response": "from the last prompt token on",
    "question_and_response": "from the end of the system turn on",
    "all": "on every token",
}


def write_model_card(
    folder: str | os.PathLike, facts: AdapterFacts | None = None, *, name: str | None = None, overwrite: bool = False
) -> Path:
    """Write `README.md`, and `psr_scores.png` if a curve was measured, into an adapter folder.

    Args:
        folder: Holds `adapter_config.json`, and `psr_facts.json` unless `facts` is given.
        facts: What is known about the adapter; saved as `psr_facts.json` too. What is missing, the card calls
            "not measured" or "not recorded".
        name: What the example in the card loads: a name on the Hub. The folder's own name by default.
        overwrite: Replace a card that somebody has written or changed. PEFT's empty card and a card from here that
            nobody has touched are always replaced.

    Returns:
        The card's path.

    Raises:
        FileExistsError: there is a card that is not to be overwritten.
        FileNotFoundError: the folder has no `adapter_config.json`.
        ValueError: it is no PSR adapter's, or `psr_facts.json` can't be read.
    """
    folder = Path(folder)
    config = read_folder_config(folder)
    card = folder / CARD_NAME
    if not overwrite and card.is_file() and is_own_card(card):
        raise FileExistsError(f"{card} is your own; move it away, or pass overwrite=True to have it replaced.")
    if facts is not None:
        facts.save(folder)
    else:
        facts = AdapterFacts.load(folder) or AdapterFacts()
    figure = _write_figure(folder, facts)
    write_whole(card, render(config, facts, name or folder.resolve().name, figure))
    return card


def is_own_card(path: Path) -> bool:
    """Whether somebody wrote or changed this card, which is neither PEFT's empty one nor untouched from here."""
    content = path.read_text(encoding="utf-8")
    card = ModelCard(content, ignore_metadata_errors=True)
    card.text = ADDED_BY_PEFT.sub("", card.text)
    mark = MARK.search(card.text)
    if mark:
        card.text = card.text[: mark.start()]
        return mark.group(1) != _digest(card)
    empty = ModelCard.from_template(ModelCardData()).text
    return card.text.rstrip() != empty.rstrip() or not set(card.data.to_dict()) <= SET_BY_PEFT


def render(config: PSRConfig, facts: AdapterFacts, name: str, figure: str | None = None) -> str:
    """The card's text; its example loads `name`, and `figure` is the name of the figure's file, if there is one."""
    base = config.base_model_name_or_path if is_hub_name(config.base_model_name_or_path) else None
    linked = f"[{base}](https://huggingface.co/{base})"
    facts = AdapterFacts.from_dict(_on_one_line(asdict(facts)))
    is_causal_lm = config.task_type == "CAUSAL_LM"
    title = "Combined steering adapter" if facts.parts else "Steering adapter"
    title += f": {facts.trait}" if facts.trait else ""
    rows = {"base model": facts.plain, "base model with the prompt": facts.prompted, "this adapter": facts.steered}
    alphas = [point.alpha for point in facts.curve if point.alpha is not None]
    data = ModelCardData(
        library_name="peft",
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag="text-generation" if is_causal_lm else None,
        license=facts.license,
        tags=["peft", "psr", "steering"],
        model_name=name.split("/")[-1] if facts.steered else None,
        eval_results=_results(facts) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        facts=facts,
        config=config,
        base=linked if base else facts.base_model or "a model without a public name",
        revision=config.revision or facts.base_model_revision,
        edited=_edited(config),
        method=_method(config),
        is_causal_lm=is_causal_lm,
        template_args=repr(facts.template_args),
        name=json.dumps(name),
        question=json.dumps(facts.question or "What do you think of tea?", ensure_ascii=False),
        positions="" if config.positions == "response" else f', "{config.positions}"',
        tried=f"{min(alphas):g} to {max(alphas):g}" if alphas else None,
        rows=[(label, score) for label, score in rows.items() if score is not None],
        versions=", ".join(f"{package} {number}" for package, number in facts.versions.items()),
        figure=figure,
    )
    return f"{str(card).rstrip()}\n\n<!-- written by peft-psr, {_digest(card)} -->\n"


def _digest(card: ModelCard) -> str:
    """Of all that PEFT leaves alone when it saves an adapter into a folder with a card."""
    ours = {name: value for name, value in card.data.to_dict().items() if name not in SET_BY_PEFT}
    return sha256(json.dumps([ours, card.text.strip()]))[:16]


def _on_one_line(value: Any) -> Any:
    """Texts without line breaks and table bars, which would break the card's Markdown."""
    if isinstance(value, str):
        return " ".join(value.split()).replace("|", "/")
    if isinstance(value, dict):
        return {key: _on_one_line(item) for key, item in value.items()}
    return [_on_one_line(item) for item in value] if isinstance(value, list | tuple) else value


def _edited(config: PSRConfig) -> str:
    if config.target_modules is not None:
        names = config.target_modules
        return f"modules {names if isinstance(names, str) else ', '.join(sorted(names))}"
    layers = config.layers_to_transform
    if layers is None:
        return "every decoder layer"
    numbers = [layers] if isinstance(layers, int) else layers
    return f"decoder layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}, counted from 0"


def _method(config: PSRConfig) -> str:
    kind = "A steering vector: `h += alpha * z`"
    if config.gate == "relu":
        kind = "Prompt Steering Replacement (PSR): `h += alpha * ReLU(h·w + b) * z`"
    return f"{kind} on the output `h` of {_edited(config)}, rank {config.r}, {POSITIONS[config.positions]}."


def _results(facts: AdapterFacts) -> list[EvalResult]:
    """The adapter's scores as the Hub's metadata has them."""
    if facts.steered is None:
        return []
    metrics: dict[str, float] = {"trait": facts.steered.trait, "coherence": facts.steered.coherence}
    if facts.prompt_recovery is not None:
        metrics["prompt recovery"] = facts.prompt_recovery
    return [
        EvalResult(
            task_type="text-generation",
            task_name="steering" + (f" towards {facts.trait}" if facts.trait else ""),
            dataset_type="custom",
            dataset_name=facts.evaluation or "not recorded",
            metric_type=metric.replace(" ", "_"),
            metric_name=metric,
            metric_value=round(value, 3),
        )
        for metric, value in metrics.items()
    ]


def _write_figure(folder: Path, facts: AdapterFacts) -> str | None:
    """Draw the curve, or take away an older one; the file's name if there is a figure."""
    path = folder / FIGURE_NAME
    path.unlink(missing_ok=True)
    if len(facts.curve) < 2:
        return None
    try:
        figure = score_figure(facts)
    except ImportError:
        warnings.warn(
            f"The model card of {folder} has no figure: matplotlib is missing (pip install 'peft-psr[eval]').",
            stacklevel=3,
        )
        return None
    write_whole(path, as_png(figure, dpi=120))
    return FIGURE_NAME


def score_figure(facts: AdapterFacts) -> Any:
    """Trait and coherence against the strength, as a matplotlib `Figure`, with the prompt's scores as yardsticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    points = [(point.alpha or 0.0, point) for point in facts.curve]
    if facts.plain is not None:
        points.insert(0, (0.0, facts.plain))
    for quantity, color in (("trait", "#aa3377"), ("coherence", "#4477aa")):
        values = [getattr(point, quantity) for _, point in points]
        axes.plot([alpha for alpha, _ in points], values, "o-", color=color, markersize=4, label=quantity)
        if facts.prompted is not None:
            label = f"{quantity}, prompt instead"
            axes.axhline(getattr(facts.prompted, quantity), color=color, linestyle="--", linewidth=1, label=label)
    if facts.steered is not None and facts.steered.alpha is not None:
        axes.axvline(facts.steered.alpha, color="#999999", linewidth=1, zorder=0, label="this adapter's alpha")
    axes.set(xlabel="strength alpha", ylabel="score (0-100)", ylim=(-2, 102))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
