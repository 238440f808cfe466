"""The charts of a run's page; the only place that says which scalars make which chart."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_explain_callback.metrics.drift import METRICS
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.tracking.scalars import STATISTICS

Rows = Sequence[Mapping[str, float]]
"""The scalars of each snapshot by tag."""

_DRIFT = {part: f"{STATISTICS}/drift_baseline_spread/{{}}/{{}}/{part}" for part in ("p10", "median", "p90")}
_NOISE, _UNRELATED = (f"{STATISTICS}/drift_scale/{{}}/{{}}/{bar}" for bar in ("noise", "unrelated"))
_FAITHFULNESS = "explain/faithfulness/{}"
_PROBE = {
    "accuracy": "explain/probe/accuracy",
    "target probability": "explain/probe/target_probability",
    "changed predictions": "explain/probe/changed_predictions",
}
_OUTPUT = "explain/probe/output"
_LIFT = "explain/lift/{}/{}"
_BLOCK = re.compile(rf"{STATISTICS}/(.+)/block_(\d+)")


def number(value: float, digits: int = 4) -> float | None:
    """Round a value to some significant digits for JSON; None if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def curve(rows: Rows, tag: str) -> list[float | None]:
    """The value of a tag in each snapshot, None if there is none."""
    return [number(row.get(tag, math.nan)) for row in rows]


def charts(rows: Rows, methods: Sequence[str], regions: Sequence[str]) -> list[dict[str, Any]]:
    """Every chart that has a value.

    A chart has a `title`, a `note` that says how to read it, its `method` or None, the smallest `range` of its axis or
    None, and `lines`. A line has a `name`, `values` for each snapshot, and optionally a band from `low` to `high`, or
    `reference: True` if other lines are compared with it.
    """
    gains: list[dict[str, Any]] = [
        {"name": method, "values": curve(rows, _FAITHFULNESS.format(method))} for method in methods
    ]
    gains.append({"name": "random order", "values": curve(rows, _FAITHFULNESS.format("random")), "reference": True})
    probe = [{"name": name, "values": curve(rows, tag)} for name, tag in _PROBE.items()]
    drawn = [_drift(rows, method) for method in methods]
    drawn += [_asked_drift(rows, method, metric) for method in methods for metric in _asked_for(rows, method)]
    drawn.append(_chart("Probe images", "share of the probe images; mean probability of the target", probe, [0, 1]))
    output = [{"name": "output", "values": curve(rows, _OUTPUT)}]
    drawn.append(_chart("Output", "mean over the probe images", output))
    drawn.append(_chart("Faithfulness", "symmetric relevance gain; the control is a random order", gains))
    for method in methods if regions else ():
        lifts: list[dict[str, Any]] = [
            {"name": region, "values": curve(rows, _LIFT.format(region, method))} for region in regions
        ]
        lifts.append({"name": "uniform", "values": [1.0] * len(rows), "reference": True})
        drawn.append(_chart("Lift of the regions", "1 = its share of the image", lifts, method=method))
    return [chart for chart in drawn if _has_values(chart)]


def block_values(rows: Rows) -> dict[str, list[list[float | None]]]:
    """Scalars of the blocks by name: one row per block, first block first, one value per snapshot."""
    tags = [match.groups() for tag in rows[-1] if (match := _BLOCK.fullmatch(tag))]
    values: dict[str, list[list[float | None]]] = {}
    for name, block in sorted(tags, key=lambda each: (each[0], int(each[1]))):
        values.setdefault(name, []).append(curve(rows, f"{STATISTICS}/{name}/block_{block}"))
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


def _asked_for(rows: Rows, method: str) -> list[str]:
    """Names of the metrics of `metrics=`, whose drift is among the first scalars."""
    tags = dict.fromkeys(tag for row in rows for tag in row)
    names = [
        match[1] for tag in tags if (match := re.fullmatch(rf"explain/drift/baseline_(.+)/{re.escape(method)}", tag))
    ]
    return [name for name in names if name != "rank_correlation"]


def _asked_drift(rows: Rows, method: str, metric: str) -> dict[str, Any]:
    """Drift by a metric of `metrics=`, in its own values."""
    bars = zip(("noise", "unrelated"), _bars(rows, method, metric), strict=True)
    ends = [{"name": name, "values": [bar] * len(rows), "reference": True} for name, bar in bars if math.isfinite(bar)]
    note = "since the baseline; band p10 to p90"
    return _chart(f"Drift: {metric}", note, [_median(_spread(rows, method, metric)), *ends], None, method)


def _spread(rows: Rows, method: str, metric: str) -> dict[str, list[float]]:
    return {part: [row.get(tag.format(method, metric), math.nan) for row in rows] for part, tag in _DRIFT.items()}


def _bars(rows: Rows, method: str, metric: str) -> tuple[float, float]:
    """Noise and unrelated level at the baseline; NaN if not measured."""
    noise, unrelated = (rows[0].get(tag.format(method, metric), math.nan) for tag in (_NOISE, _UNRELATED))
    return noise, unrelated


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
