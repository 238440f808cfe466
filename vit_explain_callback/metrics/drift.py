"""Drift: measures of how far explanation maps have moved between two sets.

Maps are (B, grid_h, grid_w); results are (B,) in float64, NaN where either map is degenerate (see `is_degenerate`).

| measure | range | unchanged | unaffected by |
|---|---|---|---|
| `spearman` | [-1, 1] | 1 | any increasing transform of either map |
| `jensen_shannon` | [0, 1] | 0 | scale |
| `top10_iou` | [0, 1] | 1 | any increasing transform |
| `centroid_shift` | [0, 1] | 0 | scale; change that is symmetric about the centre |
| `cosine` | [0, 1], signed maps [-1, 1] | 1 | scale; near 1 for diffuse maps |

`spearman`, `top10_iou` and `cosine` take the values with their sign; the others take the positive part (see
`vit_explain_callback.metrics.maps`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.regression import cosine_similarity, jensen_shannon_divergence, spearman_corrcoef

from vit_explain_callback.metrics.maps import measured, measured_signed, patch_places, strongest_tenth


def spearman(maps: Tensor, reference: Tensor) -> Tensor:
    """Spearman rank correlation, in [-1, 1]; 1 means that patches rank alike, and lower means more drift."""
    return measured_signed(lambda p, q: spearman_corrcoef(p.T, q.T).reshape(-1), maps, reference)


def jensen_shannon(maps: Tensor, reference: Tensor) -> Tensor:
    """Jensen–Shannon divergence divided by ln 2, in [0, 1]; 0 means equal, and higher means more drift.

    ½ KL(p‖m) + ½ KL(q‖m) with p, q the maps' positive parts divided by their sums and m their mean.
    """
    return measured(
        lambda p, q: jensen_shannon_divergence(p, q, reduction="none").clamp(min=0) / math.log(2), maps, reference
    )


def top10_iou(maps: Tensor, reference: Tensor) -> Tensor:
    """Intersection over union of the two sets of strongest patches, in [0, 1]; lower means more drift.

    Each set holds the strongest tenth of the patches, at least one.
    """

    def measure(p: Tensor, q: Tensor) -> Tensor:
        one, other = strongest_tenth(p), strongest_tenth(q)
        return (one & other).sum(dim=1) / (one | other).sum(dim=1)

    return measured_signed(measure, maps, reference)


def centroid_shift(maps: Tensor, reference: Tensor) -> Tensor:
    """Distance between the centres of mass, divided by the grid's diagonal, in [0, 1]; higher means more drift.

    The diagonal joins the centres of opposite corner patches.
    """
    height, width = maps.shape[-2:]
    places = patch_places((height, width), maps.device)
    diagonal = math.hypot(height - 1, width - 1)
    return measured(lambda p, q: ((p - q) @ places).norm(dim=1) / diagonal, maps, reference)


def cosine(maps: Tensor, reference: Tensor) -> Tensor:
    """Cosine similarity of the maps as vectors, in [0, 1], or in [-1, 1] of signed maps; lower means more drift."""
    return measured_signed(lambda p, q: cosine_similarity(p, q, reduction="none"), maps, reference)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": spearman,
    "jensen_shannon": jensen_shannon,
    "top10_iou": top10_iou,
    "centroid_shift": centroid_shift,
    "cosine": cosine,
}
"""Every drift measure by the name it has in TensorBoard."""

UNCHANGED = {"spearman": 1.0, "jensen_shannon": 0.0, "top10_iou": 1.0, "centroid_shift": 0.0, "cosine": 1.0}
"""What each measure gives for a map and itself."""


class MapDrift(Metric):
    """Mean of a drift measure over all images seen, in all batches and processes; NaN if none could be measured.

    Args:
        measure: A name in `drift.METRICS`.

    Raises:
        ValueError: If it is none of them.

    Attributes:
        degenerate: Number of images that could not be measured.

    Example:
        >>> drift = MapDrift("top10_iou")
        >>> drift.update(torch.rand(4, 14, 14), torch.rand(4, 14, 14))
        >>> 0 <= drift.compute() <= 1
        tensor(True)
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    degenerate: Tensor

    def __init__(self, measure: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if measure not in METRICS:
            raise ValueError(f"Expected `measure` to be one of {', '.join(METRICS)}, but got {measure!r}.")
        self.measure = METRICS[measure]
        for state in ("total", "count", "degenerate"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, reference: Tensor) -> None:
        """Take in maps and what they are compared with, (B, grid_h, grid_w) both."""
        values = self.measure(maps, reference)
        known = values.isfinite()
        self.total += values[known].sum()
        self.count += known.sum()
        self.degenerate += (~known).sum()

    def compute(self) -> Tensor:
        """The mean, a float64 scalar."""
        return self.total / self.count
