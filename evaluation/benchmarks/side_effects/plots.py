"""Figures of the side-effects benchmark that `plots` does not have."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.evaluation.reports.plots import legend_beside, styles, titled_axes
from peft_psr.evaluation.reports.report import Value


def _colours(names: list[str]) -> dict[str, str]:
    found = styles([name for name in names if name not in (PLAIN, PROMPT)])
    return {name: "black" if name in (PLAIN, PROMPT) else found[name]["color"] for name in names}


def _interval(value: Value) -> tuple[list[float], list[float]] | None:
    """Lengths of an error bar, as matplotlib wants them."""
    if value.mean is None or value.low is None or value.high is None:
        return None
    return [max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]


def trait_with_and_without(scores: Mapping[str, tuple[Value, Value]]) -> Figure:
    """A line for each method: from its trait score to that where the user asks to drop the trait.

    `scores`: {method: (without the request, with it)}, 0-100.
    """
    title = "Trait without (filled) and with (hollow) a request to drop it"
    figure, axes = titled_axes(title, (7.5, 1.2 + 0.34 * len(scores)))
    colours = _colours(list(scores))
    for row, (name, (without, with_request)) in enumerate(scores.items()):
        if without.mean is None or with_request.mean is None:
            continue
        axes.plot([without.mean, with_request.mean], [row, row], color=colours[name], linewidth=2, zorder=2)
        for value, mean, face in ((without, without.mean, colours[name]), (with_request, with_request.mean, "white")):
            axes.errorbar(
                mean, row, xerr=_interval(value), fmt="o", color=colours[name], markerfacecolor=face,
                markersize=7, capsize=2, elinewidth=0.8, zorder=3,
            )  # fmt: skip
    axes.set_yticks(range(len(scores)), list(scores))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set(xlabel="trait (0-100)", xlim=(-3, 103))
    return figure


def kl_against_trait(points: Mapping[str, tuple[Value, Value]]) -> Figure:
    """A point for each method: neutral KL, on a log scale, against trait score; the plain model has none.

    `points`: {method: (trait score 0-100, KL in nats a token)}.
    """
    title = "Distance to the base model on neutral prompts, against the trait"
    figure, axes = titled_axes(title, (8.2, max(4.6, 0.22 * len(points) + 1)))
    colours = _colours(list(points))
    markers = styles([name for name in points if name not in (PLAIN, PROMPT)])
    for name, (trait, kl) in points.items():
        if not trait.mean or not kl.mean:
            continue
        star = name == PROMPT
        axes.errorbar(
            trait.mean, kl.mean, xerr=_interval(trait), yerr=_interval(kl), color=colours[name], label=name,
            fmt="*" if star else markers[name]["marker"], markersize=14 if star else 6, capsize=2, elinewidth=0.8,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set(xlabel="trait on held-out questions (0-100)", ylabel="KL(base || model), nats a token")
    legend_beside(axes)
    return figure
