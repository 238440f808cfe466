"""Numbers from explanation maps: drift, shape, localisation, faithfulness."""

from typing import TYPE_CHECKING

from vit_explain_callback.system.lazy import lazy

if TYPE_CHECKING:
    from vit_explain_callback.metrics.attention import BlockStatistics
    from vit_explain_callback.metrics.drift import (
        DriftMetric,
        MapDrift,
        centroid_shift,
        cosine,
        jensen_shannon,
        spearman,
        top10_iou,
    )
    from vit_explain_callback.metrics.faithfulness import mean_colour, symmetric_relevance_gain
    from vit_explain_callback.metrics.localisation import lift, region_statistics
    from vit_explain_callback.metrics.shape import map_statistics, sink_lift

__all__ = [
    "BlockStatistics",
    "DriftMetric",
    "MapDrift",
    "centroid_shift",
    "cosine",
    "jensen_shannon",
    "lift",
    "map_statistics",
    "mean_colour",
    "region_statistics",
    "sink_lift",
    "spearman",
    "symmetric_relevance_gain",
    "top10_iou",
]

# Loaded at their first use: torchmetrics takes longer to import than `explain` does, which needs none of it.
_HOMES = {
    "BlockStatistics": "attention",
    "DriftMetric": "drift",
    "MapDrift": "drift",
    "centroid_shift": "drift",
    "cosine": "drift",
    "jensen_shannon": "drift",
    "lift": "localisation",
    "map_statistics": "shape",
    "mean_colour": "faithfulness",
    "region_statistics": "localisation",
    "sink_lift": "shape",
    "spearman": "drift",
    "symmetric_relevance_gain": "faithfulness",
    "top10_iou": "drift",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
