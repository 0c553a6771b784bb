"""Figures of a run: trait against coherence, faithfulness by layer, strength and gates by token. Each a `Figure`."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any
from zlib import crc32

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_psr.evaluation.measures.scoring import SteeringScore


# Colour tells the objective, line the gate, marker the layers: related methods look related.
STYLES: dict[str, dict[str, Any]] = {
    "S-Const DiM": {"color": "#9a9a9a", "linestyle": ":", "marker": "o"},
    "S-Const MSE": {"color": "#4477aa", "linestyle": ":", "marker": "o"},
    "S-PSR MSE": {"color": "#4477aa", "linestyle": "-", "marker": "o"},
    "S-PSR LL": {"color": "#ccaa22", "linestyle": "-", "marker": "o"},
    "A-Const MSE": {"color": "#66ccee", "linestyle": ":", "marker": "s"},
    "A-PSR MSE": {"color": "#66ccee", "linestyle": "-", "marker": "s"},
    "A-PSR LL": {"color": "#ee8833", "linestyle": "-", "marker": "s"},
    "A-PSR MSE ridge": {"color": "#aa3377", "linestyle": "-", "marker": "D"},
    "A-PSR KL": {"color": "#004488", "linestyle": "-", "marker": "s"},
    "S-Const ActAdd": {"color": "#9a9a9a", "linestyle": ":", "marker": "^"},
    "ITI": {"color": "#666666", "linestyle": ":", "marker": "P"},
    "Stolfo et al.": {"color": "#666666", "linestyle": "--", "marker": "X"},
    "S-Const LL": {"color": "#ccaa22", "linestyle": ":", "marker": "o"},
    "S-Const RePS": {"color": "#228833", "linestyle": ":", "marker": "o"},
    "S-ReFT-r1": {"color": "#ccaa22", "linestyle": "-.", "marker": "^"},
    "S-LoReFT LL": {"color": "#ccaa22", "linestyle": "--", "marker": "v"},
    "S-LoReFT RePS": {"color": "#228833", "linestyle": "--", "marker": "v"},
    "LoRA r=1": {"color": "#ee8833", "linestyle": "--", "marker": "P"},
    "LoRA r=8": {"color": "#ee8833", "linestyle": "-.", "marker": "X"},
    "reworded prompt": {"color": "#222222", "linestyle": "--", "marker": ""},
    "neutral instruction": {"color": "#888888", "linestyle": "-.", "marker": ""},
}
# For every other name: colours that stay apart for the colour-blind (Paul Tol's "muted").
_COLOURS = ("#332288", "#117733", "#882255", "#44aa99", "#999933", "#cc6677", "#88ccee", "#aa4499")
_OTHERS = [
    {"color": color, "linestyle": line, "marker": marker}
    for line, marker, color in product(("-", "--", "-."), ("^", "v", "P", "X", "<", ">"), _COLOURS)
]
_MANY = 9
"""Methods that one pair of axes with a legend still holds."""


def styles(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """A style for each method, no two alike; a name has its own, unless a second one has taken it."""
    found = {name: STYLES[name] for name in names if name in STYLES}
    free = dict(enumerate(_OTHERS))
    for name in sorted(set(names) - set(found)):
        start = crc32(name.encode())
        free = free or dict(enumerate(_OTHERS))
        place = next(i for i in ((start + k) % len(_OTHERS) for k in range(len(_OTHERS))) if i in free)
        found[name] = free.pop(place)
    return found


def trait_against_coherence(
    curves: Mapping[str, Sequence[SteeringScore]], plain: SteeringScore, prompted: SteeringScore, trait: str
) -> Figure:
    """One line a method, {method: scores by growing alpha}, from weak to strong; the upper right corner is best.

    More than nine methods get a panel each, with the others in grey behind the one that it is about.
    """
    title = f"Trait and coherence as alpha grows: {trait}"
    lines = {method: [plain, *curve] for method, curve in curves.items()}
    if len(curves) > _MANY:
        return _panels(lines, plain, prompted, title)
    figure, axes = titled_axes(title)
    style = styles(curves)
    for method, points in lines.items():
        axes.plot(*_coordinates(points), label=method, markersize=4, **style[method])
    axes.plot(plain.coherence, plain.trait, "o", color="black", markersize=7, label="none")
    axes.plot(prompted.coherence, prompted.trait, "*", color="black", markersize=15, label="prompt")
    axes.axvline(80, color="#bbbbbb", linewidth=1, zorder=0)
    axes.text(80.5, 2, "C80", color="#888888", fontsize=9)
    axes.set(xlabel="coherence (0-100)", ylabel="trait (0-100)", xlim=(0, 102), ylim=(-2, 102))
    legend_beside(axes)
    return figure


def _panels(
    lines: Mapping[str, Sequence[SteeringScore]], plain: SteeringScore, prompted: SteeringScore, title: str
) -> Figure:
    columns = 5 if len(lines) > 12 else 4
    rows = math.ceil(len(lines) / columns)
    figure, panels = panel_grid(len(lines), columns, (2.3 * columns, 2.1 * rows + 0.7))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    for axes, (method, points) in zip(panels, lines.items(), strict=True):
        for others in lines.values():
            axes.plot(*_coordinates(others), color="#d4d4d4", linewidth=0.8, zorder=1)
        axes.plot(*_coordinates(points), "o-", color="#aa3377", markersize=3, linewidth=1.8, zorder=3)
        axes.plot(plain.coherence, plain.trait, "o", color="black", markersize=5, zorder=4)
        axes.plot(prompted.coherence, prompted.trait, "*", color="black", markersize=10, zorder=4)
        axes.axvline(80, color="#bbbbbb", linewidth=1, zorder=0)
        axes.set(xlim=(0, 104), ylim=(-4, 104), xticks=(0, 40, 80), yticks=(0, 50, 100))
        _title(axes, method, 9)
    figure.supxlabel("coherence (0-100); dot: no steering, star: the prompt, line: coherence 80", fontsize=9)
    figure.supylabel("trait (0-100)", fontsize=9)
    return figure


def _coordinates(points: Sequence[SteeringScore]) -> tuple[list[float], list[float]]:
    return [point.coherence for point in points], [point.trait for point in points]


def rmse_by_layer(rmse: Mapping[str, Mapping[int | str, float]], trait: str) -> Figure:
    """Relative RMSE against the prompted stream, one line a method; 0 is the prompt itself, 1 no steering.

    `rmse`: {method: {layer: RMSE}}; "reworded prompt" is drawn as the yardstick.
    """
    rmse = {method: values for method, values in rmse.items() if values}
    height = max(4.8, 0.2 * len(rmse) + 1)
    figure, axes = titled_axes(f"Distance to the prompted residual stream: {trait}", (8.2, height))
    style = styles(rmse)
    for method, values in rmse.items():
        layers = [str(layer) for layer in values]
        axes.plot(layers, list(values.values()), label=method, markersize=4, **style[method])
    axes.axhline(1.0, color="#bbbbbb", linewidth=1, zorder=0)
    axes.text(0, 1.015, "no steering", color="#888888", fontsize=9)
    axes.set(xlabel="decoder layer", ylabel="relative RMSE (0 = the prompt)", ylim=(0, None))
    _label_ends(axes, style, step=0.17 / (height - 1))
    return figure


def _label_ends(axes: Axes, style: Mapping[str, Mapping[str, Any]], step: float) -> None:
    """Each line's name at its right end, in place of a legend; at least `step` apart, as a share of the height."""
    ends = sorted(
        (float(np.asarray(line.get_ydata())[-1]), float(np.asarray(line.get_xdata(orig=False))[-1]), name)
        for line in axes.lines
        if (name := str(line.get_label())) in style
    )
    bottom, top = axes.get_ylim()
    places = _moved_apart([(y - bottom) / (top - bottom) for y, _, _ in ends], step)
    for (y, x, name), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": style[name]["color"], "linewidth": 0.8, "relpos": (0, 0.5), "shrinkB": 0}
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.04, place),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops=line,
            parse_math=False,
        )


def _moved_apart(places: Sequence[float], step: float) -> list[float]:
    """Ascending places at least `step` apart, as near as can be to where they were: blocks that touch are centred."""
    blocks: list[tuple[float, int]] = []  # (mean of the places less what each is moved up by, how many)
    for index, place in enumerate(places):
        mean, count = place - index * step, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    return [mean + index * step for index, mean in enumerate(means)]


def strength_by_token(
    tokens: Sequence[str],
    prompt: torch.Tensor,
    adapter: torch.Tensor,
    method: str,
    control: torch.Tensor | None = None,
) -> Figure:
    """Heat maps, layers x tokens: how strongly the prompt and the adapter move each token, on one log scale.

    `tokens` are the edited ones as text, the first the last prompt token. `prompt`, `adapter` and `control`, an
    instruction that has nothing to do with the trait: (layers, tokens), size of the change relative to the stream.
    """
    maps = {"the prompt": prompt, method: adapter}
    if control is not None:
        maps["a neutral instruction"] = control
    figure, rows = _token_axes(tokens, len(maps))
    top = max(math.log10(max(float(values.max()), 1e-300)) for values in maps.values())
    top = max(top, -1.0)
    image = None
    for axes, (name, values) in zip(rows, maps.items(), strict=True):
        image = axes.imshow(values.clamp(min=1e-6).log10().numpy(), vmin=-2, vmax=top, **_HEAT)
        _title(axes, f"Change of the residual stream by {name}")
        axes.set_ylabel("layer")
        axes.set_yticks(*_some([str(i) for i in range(values.shape[0])], 16))
    assert image is not None
    bar = figure.colorbar(image, ax=list(rows), label="|change| / |stream|")
    ticks = [tick for tick in (-2, -1, 0, 1, 2, 3) if tick <= top]
    bar.set_ticks(ticks, labels=[f"{10**tick:g}" for tick in ticks])
    return figure


def gates_by_token(tokens: Sequence[str], gates: Mapping[int | str, torch.Tensor], method: str) -> Figure:
    """A heat map, layers x tokens: how far each layer's gate is open, relative to the layer's widest here.

    A layer's gate has a unit of its own, so colours compare tokens and not layers; the widest gate of each layer, as a
    number, stands at the right. `gates`: {layer: gate values summed over ranks, (tokens,), 0 or more}, in model order;
    `tokens` are the edited ones as text, the first the last prompt token.
    """
    figure, (axes,) = _token_axes(tokens, 1, height=max(3.0, 0.2 * len(gates) + 1.2))
    values = torch.stack([layer.float().cpu() for layer in gates.values()])
    widest = values.max(dim=1).values
    shown = values / widest.clamp(min=1e-9)[:, None]
    image = axes.imshow(shown.numpy(), vmin=0, vmax=1, **_HEAT)
    _title(axes, f"Gate values: {method}")
    axes.set_ylabel("layer")
    places, labels = _some([str(layer) for layer in gates], 40)
    axes.set_yticks(places, labels)
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, [f"{float(widest[place]):.2g}" for place in places], fontsize=7)
    right.tick_params(length=0)
    right.set_ylabel("the layer's widest gate", fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the widest", pad=0.02)
    return figure


_HEAT: dict[str, Any] = {"aspect": "auto", "origin": "lower", "cmap": "magma", "interpolation": "nearest"}
_WIDEST = 80
"""Tokens across a figure before their names are thinned out."""


def _token_axes(tokens: Sequence[str], rows: int, height: float | None = None) -> tuple[Figure, list[Axes]]:
    """Axes one above the other, tokens along the lowest; long texts name every few tokens only."""
    size = (max(7.5, 0.27 * min(len(tokens), _WIDEST)), height or 0.6 + 2.3 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False).flatten())
    places, names = _some([token.strip() or repr(token) for token in tokens], _WIDEST)
    axes[-1].set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
    return figure, axes


def _some(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Every n-th label and where it stands, so that there are at most so many."""
    places = range(0, len(labels), math.ceil(len(labels) / most) or 1)
    return list(places), [labels[place] for place in places]


def titled_axes(title: str, size: tuple[float, float] = (7.5, 4.8)) -> tuple[Figure, Axes]:
    """A figure of one pair of axes; `size` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _title(axes, title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def panel_grid(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of so many pairs of axes with shared scales, row by row; `size` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    rows = math.ceil(count / columns)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def legend_beside(axes: Axes) -> None:
    """The legend at the right of the axes; a dollar sign in a name is no mathematics."""
    for text in axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)).get_texts():
        text.set_parse_math(False)


def _title(axes: Axes, title: str, size: int = 11) -> None:
    axes.set_title(title, loc="left", fontsize=size, parse_math=False)
