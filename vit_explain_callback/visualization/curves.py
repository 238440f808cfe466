"""Curves of a run's scalars, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_explain_callback.metrics.drift import METRICS
from vit_explain_callback.visualization.encode import png, rendered

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Points (step, value) by tag."""


def drift_figure(curves: Curves, method: str) -> bytes:
    """Drift from the baseline by step, one panel a measure: median, p10 to p90, and the two bars; a PNG file."""
    figure = Figure(figsize=(3.1 * len(METRICS), 2.7), layout="constrained", dpi=110)
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        spread = [
            curves[f"explain/statistics/drift_baseline_spread/{method}/{metric}/{part}"]
            for part in ("median", "p10", "p90")
        ]
        steps = [step for step, _ in spread[0]]
        median, low, high = ([value for _, value in part] for part in spread)
        axes.fill_between(steps, low, high, color="#b32846", alpha=0.2, linewidth=0, label="p10 to p90")
        axes.plot(steps, median, color="#b32846", marker=".", label="median")
        for bar, style in (("noise", ":"), ("unrelated", "--")):
            points = curves.get(f"explain/statistics/drift_scale/{method}/{metric}/{bar}", [])
            if points and math.isfinite(points[0][1]):
                axes.axhline(points[0][1], color="#555555", linestyle=style, linewidth=1, label=bar)
        _finish(axes, metric.replace("_", " "))
    figure.axes[0].legend(fontsize=7, frameon=False)
    return png(rendered(figure))


def line_figure(curves: Curves, titled: Mapping[str, Mapping[str, str]]) -> bytes:
    """Panels of lines: by title, the tag of each line by its label; a PNG file."""
    figure = Figure(figsize=(3.1 * max(2, len(titled)), 2.7), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(titled), squeeze=False)[0]
    for axes, (title, lines) in zip(panels, titled.items(), strict=True):
        for label, tag in lines.items():
            points = curves.get(tag, [])
            axes.plot([step for step, _ in points], [value for _, value in points], marker=".", label=label)
        _finish(axes, title)
        axes.legend(fontsize=7, frameon=False)
    return png(rendered(figure))


def block_figure(curves: Curves, titled: Mapping[str, str]) -> bytes:
    """Panels of blocks against steps: by title, the tags `{value}/block_01` and on; a PNG file."""
    figure = Figure(figsize=(3.1 * max(2, len(titled)), 2.7), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(titled), squeeze=False)[0]
    for axes, (title, prefix) in zip(panels, titled.items(), strict=True):
        rows = [points for tag, points in sorted(curves.items()) if tag.startswith(f"{prefix}/block_")]
        steps = [str(step) for step, _ in rows[0]]
        drawn = axes.imshow(
            [[value for _, value in row] for row in rows], aspect="auto", origin="lower", cmap="viridis"
        )
        figure.colorbar(drawn, ax=axes)
        every = max(1, len(steps) // 6)
        axes.set_xticks(range(0, len(steps), every), steps[::every], fontsize=7)
        axes.set_yticks(range(0, len(rows), 2), [str(block + 1) for block in range(0, len(rows), 2)], fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("block", fontsize=8)
    return png(rendered(figure))


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
