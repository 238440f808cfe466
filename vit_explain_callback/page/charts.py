"""The charts of a run's page; the only place that says which scalars make which chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vit_explain_callback.metrics.drift import METRICS
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.tracking import tags
from vit_explain_callback.tracking.scalars import ATTENTION_STATISTICS, BLOCK_METRICS

Rows = Sequence[Mapping[str, float]]
"""The scalars of each snapshot by tag."""

_MOST_BLOCKS = 1000
_PROBE = {
    "accuracy": tags.ACCURACY,
    "target probability": tags.TARGET_PROBABILITY,
    "changed predictions": tags.CHANGED_PREDICTIONS,
}


def number(value: float, digits: int = 4) -> float | None:
    """Round a value to some significant digits for JSON; None if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def curve(rows: Rows, tag: str) -> list[float | None]:
    """The value of a tag in each snapshot, None if there is none."""
    return [number(row.get(tag, math.nan)) for row in rows]


def charts(
    rows: Rows, methods: Sequence[str], regions: Sequence[str], metrics: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every chart that has a value; `metrics` are those besides the built-in ones.

    A chart has a `title`, a `note` that says how to read it, its `method` or None, the smallest `range` of its axis or
    None, and `lines`. A line has a `name`, `values` for each snapshot, and optionally a band from `low` to `high`, or
    `reference: True` if other lines are compared with it.
    """
    gains: list[dict[str, Any]] = [
        {"name": method, "values": curve(rows, tags.faithfulness(method))} for method in methods
    ]
    gains.append({"name": "random order", "values": curve(rows, tags.faithfulness("random")), "reference": True})
    probe = [{"name": name, "values": curve(rows, tag)} for name, tag in _PROBE.items()]
    drawn = [_drift(rows, method) for method in methods]
    drawn += [_extra_drift(rows, method, metric) for method in methods for metric in metrics]
    drawn.append(_chart("Probe images", "share of the probe images; mean probability of the target", probe, [0, 1]))
    output = [{"name": "output", "values": curve(rows, tags.OUTPUT)}]
    drawn.append(_chart("Output", "mean over the probe images", output))
    drawn.append(_chart("Faithfulness", "symmetric relevance gain; the control is a random order", gains))
    for method in methods if regions else ():
        lifts: list[dict[str, Any]] = [
            {"name": region, "values": curve(rows, tags.region(region, method))} for region in regions
        ]
        lifts.append({"name": "uniform", "values": [1.0] * len(rows), "reference": True})
        drawn.append(_chart("Lift of the regions", "1 = its share of the image", lifts, method=method))
    return [chart for chart in drawn if _has_values(chart)]


def block_values(rows: Rows) -> dict[str, list[list[float | None]]]:
    """Scalars of the blocks by name: one row per block, first block first, one value per snapshot."""
    kinds = {f"attention/{name}": partial(tags.attention, name) for name in ATTENTION_STATISTICS}
    kinds |= {f"drift_blocks/{name}": partial(tags.block_drift, name) for name in BLOCK_METRICS}
    values: dict[str, list[list[float | None]]] = {}
    for name, tag in sorted(kinds.items()):
        of_blocks = filter(rows[-1].__contains__, map(tag, range(_MOST_BLOCKS)))
        if curves := [curve(rows, each) for each in of_blocks]:
            values[name] = curves
    return values


def _drift(rows: Rows, method: str) -> dict[str, Any]:
    """Drift on the scale from noise to unrelated; the rank correlation itself if there is no scale."""
    spread = _spread(rows, method, "spearman")
    noise, unrelated = _bars(rows, method, "spearman")
    unchanged = METRICS["spearman"].unchanged
    title, note = "Drift", "0 = noise: a change that should not matter; 1 = unrelated: another image; band p10 to p90"
    ends: list[dict[str, Any]] = [
        {"name": name, "values": [end] * len(rows), "reference": True}
        for name, end in (("noise", 0.0), ("unrelated", 1.0))
    ]
    if math.isfinite(on_scale(noise, noise, unrelated, unchanged)):
        spread = {
            part: [on_scale(value, noise, unrelated, unchanged) for value in values] for part, values in spread.items()
        }
    else:
        title, note, ends = "Rank correlation with the baseline", "1 = unchanged; band p10 to p90", []
    return _chart(title, note, [_median(spread), *ends], None, method)


def _extra_drift(rows: Rows, method: str, metric: str) -> dict[str, Any]:
    """Drift by a metric of `metrics=`, in its own values."""
    bars = zip(("noise", "unrelated"), _bars(rows, method, metric), strict=True)
    ends = [{"name": name, "values": [bar] * len(rows), "reference": True} for name, bar in bars if math.isfinite(bar)]
    note = "since the baseline; band p10 to p90"
    return _chart(f"Drift: {metric}", note, [_median(_spread(rows, method, metric)), *ends], None, method)


def _spread(rows: Rows, method: str, metric: str) -> dict[str, list[float]]:
    names = {part: tags.drift_spread(method, metric, part) for part in ("p10", "median", "p90")}
    return {part: [row.get(tag, math.nan) for row in rows] for part, tag in names.items()}


def _bars(rows: Rows, method: str, metric: str) -> tuple[float, float]:
    """Noise and unrelated level at the baseline; NaN if not measured."""
    noise, unrelated = (tags.drift_level(method, metric, level) for level in ("noise", "unrelated"))
    return rows[0].get(noise, math.nan), rows[0].get(unrelated, math.nan)


def _median(spread: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    low, median, high = ([number(value) for value in spread[part]] for part in ("p10", "median", "p90"))
    return {"name": "median image", "values": median, "low": low, "high": high}


def _chart(
    title: str, note: str, lines: list[dict[str, Any]], span: list[float] | None = None, method: str | None = None
) -> dict[str, Any]:
    shown = [line for line in lines if any(value is not None for value in line["values"])]
    return {"title": title, "note": note, "method": method, "range": span, "lines": shown}


def _has_values(chart: Mapping[str, Any]) -> bool:
    return any(not line.get("reference") for line in chart["lines"])
