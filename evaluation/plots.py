"""Figures of a run: trait against coherence, faithfulness by layer, strength by token. Each returns a `Figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from .scoring import SteeringScore


# Colour tells the objective, line the gate, marker the layers: related methods look related.
STYLES: dict[str, dict] = {
    "S-Const DiM": {"color": "#9a9a9a", "linestyle": ":", "marker": "o"},
    "S-Const MSE": {"color": "#4477aa", "linestyle": ":", "marker": "o"},
    "S-PSR MSE": {"color": "#4477aa", "linestyle": "-", "marker": "o"},
    "S-PSR LL": {"color": "#ccaa22", "linestyle": "-", "marker": "o"},
    "A-Const MSE": {"color": "#66ccee", "linestyle": ":", "marker": "s"},
    "A-PSR MSE": {"color": "#66ccee", "linestyle": "-", "marker": "s"},
    "A-PSR LL": {"color": "#ee8833", "linestyle": "-", "marker": "s"},
    "A-PSR MSE ridge": {"color": "#aa3377", "linestyle": "-", "marker": "D"},
    "reworded prompt": {"color": "#222222", "linestyle": "--", "marker": ""},
}


def _axes(title: str, size: tuple[float, float] = (7.5, 4.8)):
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def trait_against_coherence(
    curves: Mapping[str, Sequence[SteeringScore]], plain: SteeringScore, prompted: SteeringScore, trait: str
) -> Figure:
    """One line a method, from weak to strong; the upper right corner is best.

    Args:
        curves: {method: scores by growing alpha}.
        plain: The model without steering.
        prompted: The model with the instruction in its prompt.
        trait: For the title.
    """
    figure, axes = _axes(f"Trait and coherence as alpha grows: {trait}")
    for method, curve in curves.items():
        points = [plain, *curve]
        axes.plot(
            [p.coherence for p in points], [p.trait for p in points], label=method, markersize=4, **STYLES[method]
        )
    axes.plot(plain.coherence, plain.trait, "o", color="black", markersize=7, label="none")
    axes.plot(prompted.coherence, prompted.trait, "*", color="black", markersize=15, label="prompt")
    axes.axvline(80, color="#bbbbbb", linewidth=1, zorder=0)
    axes.text(80.5, 2, "C80", color="#888888", fontsize=9)
    axes.set(xlabel="coherence (0-100)", ylabel="trait (0-100)", xlim=(0, 102), ylim=(-2, 102))
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def rmse_by_layer(rmse: Mapping[str, Mapping[int | str, float]], trait: str) -> Figure:
    """Relative RMSE against the prompted stream, one line a method; 0 is the prompt itself, 1 no steering.

    Args:
        rmse: {method: {layer: RMSE}}; "reworded prompt" is drawn as the yardstick.
        trait: For the title.
    """
    figure, axes = _axes(f"Distance to the prompted residual stream: {trait}")
    for method, values in rmse.items():
        axes.plot(
            [str(layer) for layer in values], list(values.values()), label=method, markersize=4, **STYLES[method]
        )
    axes.axhline(1.0, color="#bbbbbb", linewidth=1, zorder=0)
    axes.text(0, 1.01, "no steering", color="#888888", fontsize=9)
    axes.set(xlabel="decoder layer", ylabel="relative RMSE (0 = the prompt)", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def strength_by_token(tokens: Sequence[str], prompt: torch.Tensor, adapter: torch.Tensor, method: str) -> Figure:
    """Two heat maps, layers x tokens: how strongly the prompt and the adapter move each token, on one log scale.

    Args:
        tokens: The edited tokens as text; the first is the last prompt token.
        prompt: (layers, tokens), size of the prompt's change relative to the stream.
        adapter: The same for the adapter.
        method: The adapter's method, for the title.
    """
    figure = Figure(figsize=(max(7.5, 0.27 * len(tokens)), 5.2), layout="constrained")
    top = float(torch.cat([prompt, adapter]).max())
    rows = figure.subplots(2, 1, sharex=True)
    image = None
    for axes, values, title in zip(rows, (prompt, adapter), ("the prompt", method), strict=True):
        image = axes.imshow(
            values.clamp(min=1e-6).log10().numpy(),
            aspect="auto",
            origin="lower",
            cmap="magma",
            vmin=-2,
            vmax=_log10(top),
        )
        axes.set_title(f"Change of the residual stream by {title}", loc="left", fontsize=11)
        axes.set_ylabel("layer")
        axes.set_yticks(range(values.shape[0]))
    rows[1].set_xticks(range(len(tokens)), [token.strip() or repr(token) for token in tokens], rotation=90, fontsize=8)
    assert image is not None
    bar = figure.colorbar(image, ax=list(rows), label="|change| / |stream|")
    ticks = [tick for tick in (-2, -1, 0, 1) if tick <= _log10(top)]
    bar.set_ticks(ticks, labels=[f"{10**tick:g}" for tick in ticks])
    return figure


def _log10(value: float) -> float:
    return float(torch.tensor(max(value, 1e-1)).log10())
