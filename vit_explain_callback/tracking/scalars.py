"""The scalars of a run's latest snapshot, by TensorBoard tag: the few to look at first, and everything else.

TensorBoard sorts tags by the alphabet, so that drift stands first and `explain/statistics/` last; what tells two tags
apart stands early in a name, as its narrow cards cut the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, DriftMetric
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.metrics.shape import map_statistics, sink_lift
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Snapshot

Detail: TypeAlias = Literal["brief", "full"]

BLOCK_METRICS = ("spearman", "jensen_shannon")
ATTENTION_STATISTICS = ("entropy", "lowest_head_entropy", "distance", "class_self", "sink_share")
PREFIX = "explain/"
STATISTICS = "explain/statistics"
_FIRST_OF_MAPS = ("entropy", "sink_lift")


def scalars(history: History, probe: Probe) -> dict[str, float]:
    """Every scalar of the latest snapshot, averaged over the images for which it is known; NaN if there are none.

    The baseline is compared with itself. Drift on the scale from noise to unrelated is left out where there is none:
    where the noise was not measured, or moves maps about as far as another image does.

    Args:
        history: The snapshots, the latest one last.
        probe: The images; their labels and regions.
    """
    now, baseline = history.now, history.baseline
    values = _outputs(now, baseline, probe)
    for method, maps in now.maps.items():
        values |= _maps(now, method)
        for region, masks in probe.regions.items():
            found = {name: _mean(value) for name, value in region_statistics(maps, masks).items()}
            values |= {region_tag(region, method, name): value for name, value in found.items()}
        for metric in METRICS.values():
            values |= _drift(history, method, metric, probe.regression)
    if now.blocks is not None:
        values |= _blocks(now, baseline)
    if now.reliability is not None:
        values |= {f"explain/faithfulness/{name}": _mean(gain) for name, gain in now.reliability.gains.items()}
    return values


def drift_scalars(history: History, probe: Probe, metric: DriftMetric) -> dict[str, float]:
    """The scalars of a metric that the user asks for: like those of the built-in ones, but for where they are logged.

    Raises:
        Exception: What its function raised.
    """
    found: dict[str, float] = {}
    for method in history.now.maps:
        found |= _drift(history, method, metric, probe.regression, asked_for=True)
    return found


def of_detail(values: Mapping[str, float], detail: Detail) -> dict[str, float]:
    """Those of all scalars that are logged: all of them, or those that are not under `explain/statistics/`."""
    return {tag: value for tag, value in values.items() if detail == "full" or not tag.startswith(f"{STATISTICS}/")}


def drift_tag(
    method: str, metric: str, reference: Literal["baseline", "previous"] = "baseline", asked_for: bool = False
) -> str:
    """Tag of the mean drift since the baseline or the previous snapshot; among the first where the user asks for it.

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
    """Tag of each value that is kept for the whole run, and the tag of the scalar that it is the last of."""
    tags: dict[str, str] = {}
    for method in methods:
        tags[f"explain/final/drift/{method}"] = drift_tag(method, "spearman")
        tags[f"explain/final/faithfulness/{method}"] = f"explain/faithfulness/{method}"
        for region in regions:
            tags[f"explain/final/lift/{region}/{method}"] = region_tag(region, method, "lift")
    return tags


def _outputs(now: Snapshot, baseline: Snapshot, probe: Probe) -> dict[str, float]:
    """What the model makes of the images: quantities, or classes and their probabilities."""
    if probe.regression:
        return {"explain/probe/output": _mean(now.logits.gather(1, now.target[:, None]))}
    values = {
        "explain/probe/target_probability": _mean(now.target_probability(probe.multilabel)),
        "explain/probe/changed_predictions": _mean((now.prediction != baseline.prediction).double()),
    }
    if probe.labels is not None:
        known = probe.labels >= 0
        values["explain/probe/accuracy"] = _mean((now.prediction == probe.labels).double()[known])
    return values


def _maps(now: Snapshot, method: str) -> dict[str, float]:
    """The shape of the maps."""
    maps = now.maps[method]
    found = {name: _mean(value) for name, value in map_statistics(maps).items()}
    if now.blocks is not None and now.blocks.columns.shape[2:] == maps.shape[1:]:
        found["sink_lift"] = _mean(sink_lift(maps, now.blocks.columns.mean(dim=1)))
    first = {f"explain/map/{name}/{method}": found.pop(name) for name in _FIRST_OF_MAPS if name in found}
    return first | {f"{STATISTICS}/map/{method}/{name}": value for name, value in found.items()}


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
    """Tag of a block, counted from 0; the first is block 1 to the reader.

    Example:
        >>> block_name(0)
        'block_01'
    """
    return f"block_{block + 1:02d}"


def _mean(values: Tensor) -> float:
    return torch.nanmean(values.double()).item()


def _quantiles(values: Tensor) -> list[float]:
    return values.nanquantile(torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)).tolist()
