"""The scalars of a run's latest snapshot, by TensorBoard tag: a few to look at first, and everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, DriftMetric
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.metrics.shape import map_statistics, sink_lift
from vit_explain_callback.tracking import tags
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.settings import Level
from vit_explain_callback.tracking.snapshot import Snapshot

BLOCK_METRICS = ("spearman", "jensen_shannon")
ATTENTION_STATISTICS = ("entropy", "lowest_head_entropy", "distance", "class_self", "sink_share")


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
            values |= {tags.region(region, method, name): _mean(value) for name, value in statistics.items()}
        for metric in METRICS.values():
            values |= _drift(history, method, metric, probe.regression)
    if now.blocks is not None:
        values |= _blocks(now, baseline)
    if now.reliability is not None:
        values |= {tags.faithfulness(name): _mean(gain) for name, gain in now.reliability.gains.items()}
    return values


def drift_scalars(history: History, probe: Probe, metric: DriftMetric) -> dict[str, float]:
    """The scalars of a metric of `metrics=`; they differ from those of the built-in metrics in their tags.

    Raises:
        Exception: Whatever its function raised.
    """
    values: dict[str, float] = {}
    for method in history.now.maps:
        values |= _drift(history, method, metric, probe.regression, is_extra=True)
    return values


def logged_at(level: Level, values: Mapping[str, float]) -> dict[str, float]:
    """The scalars that a level of detail logs: all, or those outside `explain/statistics/`."""
    return {tag: value for tag, value in values.items() if level == "full" or not tag.startswith(f"{tags.STATISTICS}/")}


def _outputs(now: Snapshot, baseline: Snapshot, probe: Probe) -> dict[str, float]:
    """The outputs of the model: quantities, or classes and their probabilities."""
    if probe.regression:
        return {tags.OUTPUT: _mean(now.logits.gather(1, now.target[:, None]))}
    values = {
        tags.TARGET_PROBABILITY: _mean(now.target_probability(probe.multilabel)),
        tags.CHANGED_PREDICTIONS: _mean((now.prediction != baseline.prediction).double()),
    }
    if probe.labels is not None:
        is_labelled = probe.labels >= 0
        values[tags.ACCURACY] = _mean((now.prediction == probe.labels).double()[is_labelled])
    return values


def _maps(now: Snapshot, method: str) -> dict[str, float]:
    """The shape of the maps."""
    maps = now.maps[method]
    statistics = {name: _mean(value) for name, value in map_statistics(maps).items()}
    if now.blocks is not None and now.blocks.columns.shape[2:] == maps.shape[1:]:
        statistics["sink_lift"] = _mean(sink_lift(maps, now.blocks.columns.mean(dim=1)))
    return {tags.map_statistic(method, name): value for name, value in statistics.items()}


def _drift(
    history: History, method: str, metric: DriftMetric, regression: bool, is_extra: bool = False
) -> dict[str, float]:
    """Drift by one metric since the baseline and since the previous snapshot: mean, spread, split, scale."""
    now = history.now
    unchanged = metric.unchanged
    fixed = history.baseline.scale(method, metric)
    values: dict[str, float] = {}
    references: tuple[tuple[tags.Reference, Snapshot], ...] = (
        ("baseline", history.baseline),
        ("previous", history.previous),
    )
    for name, reference in references:
        by_image = now.drift_from(reference, method, metric)
        changed = now.prediction != reference.prediction
        mean = _mean(by_image)
        values[tags.drift(method, metric.name, name, is_extra)] = mean
        parts = zip(("p10", "median", "p90"), _quantiles(by_image), strict=True)
        values |= {tags.drift_spread(method, metric.name, part, name): value for part, value in parts}
        if not regression:
            values[tags.drift_split(method, metric.name, "unchanged", name)] = _mean(by_image[~changed])
            values[tags.drift_split(method, metric.name, "changed", name)] = _mean(by_image[changed])
        if fixed is not None and math.isfinite(on_scale(unchanged, *fixed, unchanged)):
            values[tags.scaled_drift(method, metric.name, name)] = on_scale(mean, *fixed, unchanged)
    if (current := now.scale(method, metric)) is not None:
        names = zip(("noise", "unrelated"), current, strict=True)
        values |= {tags.drift_level(method, metric.name, name): value for name, value in names}
    return values


def _blocks(now: Snapshot, baseline: Snapshot) -> dict[str, float]:
    assert now.blocks is not None
    values: dict[str, float] = {}
    for statistic in ATTENTION_STATISTICS:
        for block, value in enumerate(getattr(now.blocks, statistic).T):
            values[tags.attention(statistic, block)] = _mean(value)
    for metric in BLOCK_METRICS:
        drift = now.block_drift_from(baseline, metric)
        for block, mean in enumerate([] if drift is None else drift.tolist()):
            values[tags.block_drift(metric, block)] = mean
    return values


def _mean(values: Tensor) -> float:
    return torch.nanmean(values.double()).item()


def _quantiles(values: Tensor) -> list[float]:
    return values.nanquantile(torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)).tolist()
