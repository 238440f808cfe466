"""Drift as a `torchmetrics.Metric`, for a loop of one's own over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vit_explain_callback.metrics.drift import METRICS


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
