"""The scalars of a run's latest snapshot, by TensorBoard tag."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, UNCHANGED
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.metrics.shape import map_statistics, sink_lift
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Snapshot

BLOCK_METRICS = ("spearman", "jensen_shannon")
ATTENTION_STATISTICS = ("entropy", "lowest_head_entropy", "distance", "class_self", "sink_share")


def scalars(history: History, probe: Probe) -> dict[str, float]:
    """Every scalar of the latest snapshot, averaged over the images for which it is known; NaN if there are none.

    The baseline is compared with itself.

    Args:
        history: The snapshots, the latest one last.
        probe: The images; their labels and regions.
    """
    now, baseline, regions = history.now, history.baseline, probe.regions
    values = _outputs(now, baseline, probe)
    for method, maps in now.maps.items():
        values |= {f"map_stats/{method}/{stat}": _mean(v) for stat, v in map_statistics(maps).items()}
        if now.blocks is not None:
            values[f"map_stats/{method}/sink_lift"] = _mean(sink_lift(maps, now.blocks.columns.mean(dim=1)))
        for region, masks in regions.items():
            found = region_statistics(maps, masks)
            values |= {f"region/{region}/{method}/{stat}": _mean(v) for stat, v in found.items()}
        for metric in METRICS:
            values |= _drift(history, method, metric, probe.regression)
    if now.blocks is not None:
        values |= _blocks(now, baseline)
    if now.reliability is not None:
        values |= {f"faithfulness/{name}/srg": _mean(gain) for name, gain in now.reliability.gains.items()}
    return values


def final_tags(methods: Sequence[str], regions: Iterable[str], checked: bool) -> dict[str, str]:
    """Tag of each value that is kept for the whole run, and the tag of the scalar that it is the last of."""
    tags: dict[str, str] = {}
    for method in methods:
        tags[f"final/drift/{method}"] = f"drift_baseline/{method}/spearman"
        if checked:
            tags[f"final/faithfulness/{method}"] = f"faithfulness/{method}/srg"
        for region in regions:
            tags[f"final/lift/{region}/{method}"] = f"region/{region}/{method}/lift"
    return tags


def _outputs(now: Snapshot, baseline: Snapshot, probe: Probe) -> dict[str, float]:
    """What the model makes of the images: quantities, or classes and their probabilities."""
    if probe.regression:
        return {"probe/output": _mean(now.logits.gather(1, now.target[:, None]))}
    values = {
        "probe/target_probability": _mean(now.target_probability),
        "probe/changed_predictions": _mean((now.prediction != baseline.prediction).double()),
    }
    if probe.labels is not None:
        known = probe.labels >= 0
        values["probe/accuracy"] = _mean((now.prediction == probe.labels).double()[known])
    return values


def _drift(history: History, method: str, metric: str, regression: bool) -> dict[str, float]:
    now = history.now
    tail = f"{method}/{metric}"
    fixed = history.baseline.scale(method, metric)
    values: dict[str, float] = {}
    for name, reference in (("drift_baseline", history.baseline), ("drift_previous", history.previous)):
        by_image = now.drift_from(reference, method, metric)
        changed = now.prediction != reference.prediction
        mean = _mean(by_image)
        low, middle, high = _quantiles(by_image)
        values |= {
            f"{name}/{tail}": mean,
            f"{name}_spread/{tail}/p10": low,
            f"{name}_spread/{tail}/median": middle,
            f"{name}_spread/{tail}/p90": high,
        }
        if not regression:
            values[f"{name}_split/{tail}/unchanged"] = _mean(by_image[~changed])
            values[f"{name}_split/{tail}/changed"] = _mean(by_image[changed])
        if fixed is not None:
            values[f"{name}_scaled/{tail}"] = on_scale(mean, *fixed, UNCHANGED[metric])
    if (current := now.scale(method, metric)) is not None:
        values |= {f"drift_scale/{tail}/noise": current[0], f"drift_scale/{tail}/unrelated": current[1]}
    return values


def _blocks(now: Snapshot, baseline: Snapshot) -> dict[str, float]:
    assert now.blocks is not None
    values: dict[str, float] = {}
    for block in range(now.blocks.rows.shape[1]):
        for statistic in ATTENTION_STATISTICS:
            values[f"attention/{statistic}/{block_name(block)}"] = _mean(getattr(now.blocks, statistic)[:, block])
        if baseline.blocks is not None:
            one, other = now.blocks.rows[:, block], baseline.blocks.rows[:, block]
            values |= {
                f"drift_blocks/{metric}/{block_name(block)}": _mean(METRICS[metric](one, other))
                for metric in BLOCK_METRICS
            }
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
