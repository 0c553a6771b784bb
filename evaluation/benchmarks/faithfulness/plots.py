"""Figures of the faithfulness benchmark that `plots` does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peft_psr.evaluation.reports.plots import legend_beside, styles, titled_axes


REFERENCES = {
    "prompt": {"color": "black", "linestyle": "-", "marker": "", "linewidth": 2.2},
    "neutral instruction": {"color": "#cc3311", "linestyle": "-.", "marker": "", "linewidth": 2.2},
}
"""How lines are drawn that are no method's."""


def strength_by_place(strengths: Mapping[str, Sequence[float]], trait: str) -> Figure:
    """How far tokens move by their place in the response, on a log scale; one line a method or prompt.

    Args:
        strengths: {name: |change of the stream| / |stream| by place, from the last prompt token on}.
        trait: For the title.
    """
    size = (8.2, max(4.8, 0.2 * len(strengths) + 1))
    figure, axes = titled_axes(f"Change of the residual stream by place: {trait}", size)
    others = styles([name for name in strengths if name not in REFERENCES])
    for name, values in strengths.items():
        # a method may leave a token alone, which a log scale can't show
        points = [value if value > 0 else float("nan") for value in values]
        axes.plot(range(len(points)), points, label=name, markersize=3, **(REFERENCES.get(name) or others[name]))
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="token of the response (0: the last prompt token)", ylabel="|change| / |stream|, mean of layers")
    legend_beside(axes)
    return figure
