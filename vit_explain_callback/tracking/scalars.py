"""The scalars of a run's latest snapshot, by TensorBoard tag: a few to look at first, and everything else.

TensorBoard sorts tags alphabetically, so drift comes first and `explain/statistics/` last. Names differ early, as
TensorBoard's narrow cards cut the middle of a name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, DriftMetric
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.metrics.shape import map_statistics, sink_lift
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.settings import Level
from vit_explain_callback.tracking.snapshot import Snapshot

BLOCK_METRICS = ("spearman", "jensen_shannon")
ATTENTION_STATISTICS = ("entropy", "lowest_head_entropy", "distance", "class_self", "sink_share")
PREFIX = "explain/"
STATISTICS = "explain/statistics"
_FIRST_OF_MAPS = ("entropy", "sink_lift")


def scalars(history: History, probe: Probe) -> dict[str, float]:
    """Every scalar of the latest snapshot, averaged over the images with a value; NaN if there are none.

    The baseline is compared with itself. Drift on the scale from noise to unrelated is omitted without such a scale: if
    noise was not measured, or if it moves maps about as far as another image does.

    Args:
        history: The snapshots, latest last.
        probe: The images, with labels and regions.
    """
    now, baseline = history.now, history.baseline
    values = _outputs(now, baseline, probe)
    for method, maps in now.maps.items():
        values |= _maps(now, method)
        for region, masks in probe.regions.items():
            statistics = region_statistics(maps, masks)
            values |= {region_tag(region, method, name): _mean(value) for name, value in statistics.items()}
        for metric in METRICS.values():
            values |= _drift(history, method, metric, probe.regression)
    if now.blocks is not None:
        values |= _blocks(now, baseline)
    if now.reliability is not None:
        values |= {f"explain/faithfulness/{name}": _mean(gain) for name, gain in now.reliability.gains.items()}
    return values


def drift_scalars(history: History, probe: Probe, metric: DriftMetric) -> dict[str, float]:
    """The scalars of a metric of `metrics=`; they differ from those of the built-in metrics in their tags.

    Raises:
        Exception: Whatever its function raised.
    """
    values: dict[str, float] = {}
    for method in history.now.maps:
        values |= _drift(history, method, metric, probe.regression, asked_for=True)
    return values


def logged_at(level: Level, values: Mapping[str, float]) -> dict[str, float]:
    """The scalars that a level of detail logs: all, or those outside `explain/statistics/`."""
    return {tag: value for tag, value in values.items() if level == "full" or not tag.startswith(f"{STATISTICS}/")}


def drift_tag(
    method: str, metric: str, reference: Literal["baseline", "previous"] = "baseline", asked_for: bool = False
) -> str:
    """Tag of the mean drift since the baseline or the previous snapshot; one of the first tags for `metrics=`.

    Example:
        >>> drift_tag("rollout", "spearman"), drift_tag("rollout", "cosine")
        ('explain/drift/baseline_rank_correlation/rollout', 'explain/statistics/drift_baseline/rollout/cosine')
        >>> drift_tag("rollout", "cosine", asked_for=True)
        'explain/drift/baseline_cosine/rollout'
    """
    if metric == "spearman" or asked_for:
        name = "rank_correlation" if metric == "spearman" else metric
        return f"explain/drift/{reference}_{name}/{method}"
    return f"{STATISTICS}/drift_{reference}/{method}/{metric}"


def region_tag(region: str, method: str, statistic: str) -> str:
    """Tag of the mean of one of the `region_statistics`."""
    if statistic == "lift":
        return f"explain/lift/{region}/{method}"
    return f"{STATISTICS}/region/{region}/{method}/{statistic}"


def final_tags(methods: Sequence[str], regions: Iterable[str]) -> dict[str, str]:
    """Tag of each final value, and the tag of the scalar whose last value it is."""
    tags: dict[str, str] = {}
    for method in methods:
        tags[f"explain/final/drift/{method}"] = drift_tag(method, "spearman")
        tags[f"explain/final/faithfulness/{method}"] = f"explain/faithfulness/{method}"
        for region in regions:
            tags[f"explain/final/lift/{region}/{method}"] = region_tag(region, method, "lift")
    return tags


def _outputs(now: Snapshot, baseline: Snapshot, probe: Probe) -> dict[str, float]:
    """The outputs of the model: quantities, or classes and their probabilities."""
    if probe.regression:
        return {"explain/probe/output": _mean(now.logits.gather(1, now.target[:, None]))}
    values = {
        "explain/probe/target_probability": _mean(now.target_probability(probe.multilabel)),
        "explain/probe/changed_predictions": _mean((now.prediction != baseline.prediction).double()),
    }
    if probe.labels is not None:
        is_labelled = probe.labels >= 0
        values["explain/probe/accuracy"] = _mean((now.prediction == probe.labels).double()[is_labelled])
    return values


def _maps(now: Snapshot, method: str) -> dict[str, float]:
    """The shape of the maps."""
    maps = now.maps[method]
    statistics = {name: _mean(value) for name, value in map_statistics(maps).items()}
    if now.blocks is not None and now.blocks.columns.shape[2:] == maps.shape[1:]:
        statistics["sink_lift"] = _mean(sink_lift(maps, now.blocks.columns.mean(dim=1)))
    first = {f"explain/map/{name}/{method}": statistics.pop(name) for name in _FIRST_OF_MAPS if name in statistics}
    return first | {f"{STATISTICS}/map/{method}/{name}": value for name, value in statistics.items()}


def _drift(
    history: History, method: str, metric: DriftMetric, regression: bool, asked_for: bool = False
) -> dict[str, float]:
    """Drift by one metric since the baseline and since the previous snapshot: mean, spread, split, scale."""
    now = history.now
    tail, unchanged = f"{method}/{metric.name}", metric.unchanged
    fixed = history.baseline.scale(method, metric)
    values: dict[str, float] = {}
    references: tuple[tuple[Literal["baseline", "previous"], Snapshot], ...] = (
        ("baseline", history.baseline),
        ("previous", history.previous),
    )
    for name, reference in references:
        by_image = now.drift_from(reference, method, metric)
        changed = now.prediction != reference.prediction
        mean = _mean(by_image)
        values[drift_tag(method, metric.name, name, asked_for)] = mean
        parts = zip(("p10", "median", "p90"), _quantiles(by_image), strict=True)
        values |= {f"{STATISTICS}/drift_{name}_spread/{tail}/{part}": value for part, value in parts}
        if not regression:
            values[f"{STATISTICS}/drift_{name}_split/{tail}/unchanged"] = _mean(by_image[~changed])
            values[f"{STATISTICS}/drift_{name}_split/{tail}/changed"] = _mean(by_image[changed])
        if fixed is not None and math.isfinite(on_scale(unchanged, *fixed, unchanged)):
            first = metric.name == "spearman" and name == "baseline"
            tag = f"explain/drift/noise_to_unrelated/{method}" if first else f"{STATISTICS}/drift_{name}_scaled/{tail}"
            values[tag] = on_scale(mean, *fixed, unchanged)
    if (current := now.scale(method, metric)) is not None:
        names = zip(("noise", "unrelated"), current, strict=True)
        values |= {f"{STATISTICS}/drift_scale/{tail}/{name}": value for name, value in names}
    return values


def _blocks(now: Snapshot, baseline: Snapshot) -> dict[str, float]:
    assert now.blocks is not None
    values: dict[str, float] = {}
    for statistic in ATTENTION_STATISTICS:
        for block, value in enumerate(getattr(now.blocks, statistic).T):
            values[f"{STATISTICS}/attention/{statistic}/{block_name(block)}"] = _mean(value)
    for metric in BLOCK_METRICS:
        drift = now.block_drift_from(baseline, metric)
        for block, mean in enumerate([] if drift is None else drift.tolist()):
            values[f"{STATISTICS}/drift_blocks/{metric}/{block_name(block)}"] = mean
    return values


def block_name(block: int) -> str:
    """Name of a block, counted from 0, in tags, which count from 1.

    Example:
        >>> block_name(0)
        'block_01'
    """
    return f"block_{block + 1:02d}"


def _mean(values: Tensor) -> float:
    return torch.nanmean(values.double()).item()


def _quantiles(values: Tensor) -> list[float]:
    return values.nanquantile(torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)).tolist()
