"""The TensorBoard tag of every scalar and picture: the only place that spells them.

TensorBoard sorts tags alphabetically, so drift comes first and `explain/statistics/` last. Names differ early, as its
narrow cards cut the middle of a name. Blocks are counted from 0 here and from 1 in tags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

Reference: TypeAlias = Literal["baseline", "previous"]

PREFIX = "explain/"
STATISTICS = "explain/statistics"
ACCURACY = "explain/probe/accuracy"
TARGET_PROBABILITY = "explain/probe/target_probability"
CHANGED_PREDICTIONS = "explain/probe/changed_predictions"
OUTPUT = "explain/probe/output"
HEAT_MAP = "explain/heatmap/blocks"

_FIRST_OF_MAPS = ("entropy", "sink_lift")


def drift(method: str, metric: str, reference: Reference = "baseline", is_extra: bool = False) -> str:
    """Mean drift since the baseline or the previous snapshot; `is_extra` for a metric of `metrics=`.

    Example:
        >>> drift("rollout", "spearman"), drift("rollout", "cosine")
        ('explain/drift/baseline_rank_correlation/rollout', 'explain/statistics/drift_baseline/rollout/cosine')
        >>> drift("rollout", "cosine", is_extra=True)
        'explain/drift/baseline_cosine/rollout'
    """
    if metric == "spearman" or is_extra:
        name = "rank_correlation" if metric == "spearman" else metric
        return f"explain/drift/{reference}_{name}/{method}"
    return f"{STATISTICS}/drift_{reference}/{method}/{metric}"


def scaled_drift(method: str, metric: str, reference: Reference) -> str:
    """Drift on the scale from noise to unrelated."""
    if metric == "spearman" and reference == "baseline":
        return f"explain/drift/noise_to_unrelated/{method}"
    return f"{STATISTICS}/drift_{reference}_scaled/{method}/{metric}"


def drift_spread(method: str, metric: str, part: str, reference: Reference = "baseline") -> str:
    """The `median`, `p10` or `p90` of the drift over the images."""
    return f"{STATISTICS}/drift_{reference}_spread/{method}/{metric}/{part}"


def drift_split(method: str, metric: str, part: str, reference: Reference) -> str:
    """Mean drift of the images whose prediction is `unchanged` or `changed`."""
    return f"{STATISTICS}/drift_{reference}_split/{method}/{metric}/{part}"


def drift_level(method: str, metric: str, level: str) -> str:
    """The `noise` or `unrelated` level of a drift metric."""
    return f"{STATISTICS}/drift_scale/{method}/{metric}/{level}"


def block_drift(metric: str, block: int) -> str:
    """Drift of what a block's readout attends to."""
    return f"{STATISTICS}/drift_blocks/{metric}/{block_name(block)}"


def attention(statistic: str, block: int) -> str:
    """A statistic of a block's attention."""
    return f"{STATISTICS}/attention/{statistic}/{block_name(block)}"


def map_statistic(method: str, statistic: str) -> str:
    """A statistic of the maps."""
    if statistic in _FIRST_OF_MAPS:
        return f"explain/map/{statistic}/{method}"
    return f"{STATISTICS}/map/{method}/{statistic}"


def region(name: str, method: str, statistic: str = "lift") -> str:
    """A statistic of the maps on a region."""
    if statistic == "lift":
        return f"explain/lift/{name}/{method}"
    return f"{STATISTICS}/region/{name}/{method}/{statistic}"


def faithfulness(order: str) -> str:
    """Faithfulness of a method, or of a `random` order."""
    return f"explain/faithfulness/{order}"


def final(methods: Sequence[str], regions: Iterable[str]) -> dict[str, str]:
    """Tag of each final value, and the tag of the scalar whose last value it is."""
    tags: dict[str, str] = {}
    for method in methods:
        tags[f"explain/final/drift/{method}"] = drift(method, "spearman")
        tags[f"explain/final/faithfulness/{method}"] = faithfulness(method)
        for name in regions:
            tags[f"explain/final/lift/{name}/{method}"] = region(name, method)
    return tags


def filmstrip(method: str) -> str:
    """The filmstrip of a method."""
    return f"explain/filmstrip/{method}"


def overlay(method: str, image: int, kind: Literal["", "_change", "_animation"] = "") -> str:
    """The overlay of an image, its change, or its animation."""
    return f"explain/overlay{kind}/{method}/{image}"


def block_name(block: int) -> str:
    """Name of a block in tags.

    Example:
        >>> block_name(0)
        'block_01'
    """
    return f"block_{block + 1:02d}"


def with_prefix(tag: str, prefix: str) -> str:
    """A tag with another prefix than `explain/`.

    Example:
        >>> with_prefix("explain/drift/a", "explain_2/")
        'explain_2/drift/a'
    """
    return prefix + tag.removeprefix(PREFIX)
