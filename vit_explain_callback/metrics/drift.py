"""Drift: metrics of how far explanation maps have moved between two sets.

Maps are (B, grid_h, grid_w); results are (B,) in float64, NaN where either map is degenerate (see `is_degenerate`).

| metric | range | unchanged | unaffected by |
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
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.regression import cosine_similarity, jensen_shannon_divergence, spearman_corrcoef

from vit_explain_callback.metrics.maps import on_distributions, on_values, patch_places, strongest_tenth

_RESERVED = ("rank_correlation",)  # what the tags call `spearman`


def spearman(maps: Tensor, reference: Tensor) -> Tensor:
    """Spearman rank correlation, in [-1, 1]; 1 means that patches rank alike, and lower means more drift."""
    return on_values(lambda p, q: spearman_corrcoef(p.T, q.T).reshape(-1), maps, reference)


def jensen_shannon(maps: Tensor, reference: Tensor) -> Tensor:
    """Jensen–Shannon divergence divided by ln 2, in [0, 1]; 0 means equal, and higher means more drift.

    ½ KL(p‖m) + ½ KL(q‖m) with p, q the maps' positive parts divided by their sums and m their mean.
    """
    return on_distributions(
        lambda p, q: jensen_shannon_divergence(p, q, reduction="none").clamp(min=0) / math.log(2), maps, reference
    )


def top10_iou(maps: Tensor, reference: Tensor) -> Tensor:
    """Intersection over union of the two sets of strongest patches, in [0, 1]; lower means more drift.

    Each set holds the strongest tenth of the patches, at least one.
    """

    def metric(p: Tensor, q: Tensor) -> Tensor:
        one, other = strongest_tenth(p), strongest_tenth(q)
        return (one & other).sum(dim=1) / (one | other).sum(dim=1)

    return on_values(metric, maps, reference)


def centroid_shift(maps: Tensor, reference: Tensor) -> Tensor:
    """Distance between the centres of mass, divided by the grid's diagonal, in [0, 1]; higher means more drift.

    The diagonal joins the centres of opposite corner patches.
    """
    height, width = maps.shape[-2:]
    places = patch_places((height, width), maps.device)
    diagonal = math.hypot(height - 1, width - 1)
    return on_distributions(lambda p, q: ((p - q) @ places).norm(dim=1) / diagonal, maps, reference)


def cosine(maps: Tensor, reference: Tensor) -> Tensor:
    """Cosine similarity of the maps as vectors, in [0, 1], or in [-1, 1] of signed maps; lower means more drift."""
    return on_values(lambda p, q: cosine_similarity(p, q, reduction="none"), maps, reference)


@dataclass(frozen=True)
class DriftMetric:
    """A metric of drift: one of those in `METRICS`, or one of your own, wherever a metric's name may stand.

    Args:
        name: Part of its tags: letters, digits, `_`, `.` and `-`.
        function: Called as `function(maps, reference)`, both (B, grid_h, grid_w) of one method on the CPU, raw; gives
            (B,), NaN for images that it cannot measure. Greater or lower may mean more drift.
        unchanged: Its value for a map and itself.
        lowest: Least value that it can give; None where there is no bound.
        highest: Greatest value, likewise.

    Raises:
        TypeError: If `function` cannot be called, or `unchanged` is no number.
        ValueError: If `name` has other characters, or is that of another metric of `METRICS`.

    Example:
        >>> peak = DriftMetric("peak", lambda maps, reference: maps.amax((1, 2)) / reference.amax((1, 2)), unchanged=1)
        >>> peak(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[4.0, 2.0]]]))
        tensor([0.5000], dtype=torch.float64)
    """

    name: str
    # Not `Tensor`: LightningCLI would then take no function whose return type is not annotated.
    function: Callable[[Tensor, Tensor], Any]
    unchanged: float
    lowest: float | None = None
    highest: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"Expected `name` of letters, digits, `_`, `.` and `-`, but got {self.name!r}.")
        if not callable(self.function) or not isinstance(self.unchanged, int | float):
            raise TypeError(
                f"Expected `{self.name}` to have a `function(maps, reference)` and a number `unchanged`, but got "
                f"{self.function!r:.80} and {self.unchanged!r:.80}."
            )

    def __call__(self, maps: Tensor, reference: Tensor) -> Tensor:
        """Values of maps against a reference, (B, grid_h, grid_w) both: (B,) in float64.

        Raises:
            RuntimeError: If the function gives something else.
        """
        values = self.function(maps, reference)
        if not isinstance(values, Tensor) or values.shape != (len(maps),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise RuntimeError(
                f"Expected the function of `{self.name}` to give a tensor of shape ({len(maps)},), one value per "
                f"image, but got {got}."
            )
        return values.detach().double()


METRICS = {
    metric.name: metric
    for metric in (
        DriftMetric("spearman", spearman, unchanged=1, lowest=-1, highest=1),
        DriftMetric("jensen_shannon", jensen_shannon, unchanged=0, lowest=0, highest=1),
        DriftMetric("top10_iou", top10_iou, unchanged=1, lowest=0, highest=1),
        DriftMetric("centroid_shift", centroid_shift, unchanged=0, lowest=0, highest=1),
        DriftMetric("cosine", cosine, unchanged=1, lowest=-1, highest=1),
    )
}
"""Every built-in metric by its name; all of them are always computed."""


def resolve_metrics(metrics: Sequence[str | DriftMetric]) -> tuple[DriftMetric, ...]:
    """Turn names and objects into objects.

    Raises:
        TypeError: If an entry is neither.
        ValueError: If a name is unknown, or two have the same name.
    """
    resolved: list[DriftMetric] = []
    for metric in [metrics] if isinstance(metrics, str | DriftMetric) else metrics:
        if isinstance(metric, str):
            if metric not in METRICS:
                raise ValueError(f"Expected `metrics` to name {', '.join(METRICS)}, but got {metric!r}.")
            metric = METRICS[metric]
        if not isinstance(metric, DriftMetric):
            raise TypeError(
                f"Expected `metrics` to hold names or `DriftMetric` objects, but got {metric!r:.200}. A function of "
                "your own goes in as `DriftMetric('name', function, unchanged=…)`."
            )
        if METRICS.get(metric.name, metric) != metric or metric.name in _RESERVED:
            raise ValueError(f"Expected `metrics` with names of their own, but `{metric.name}` is taken.")
        resolved.append(metric)
    names = [metric.name for metric in resolved]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected `metrics` to hold each only once, but got {names}.")
    return tuple(resolved)


class MapDrift(Metric):
    """Mean of a drift metric over the images of all batches and processes; NaN if none could be measured.

    Args:
        metric: A name in `drift.METRICS`, or a `DriftMetric`.
        **kwargs: As every `torchmetrics.Metric` takes them.

    Raises:
        TypeError: If `metric` is neither.
        ValueError: If there is no metric of that name.

    Attributes:
        degenerate: Number of images that could not be measured.

    Example:
        >>> drift = MapDrift("top10_iou")
        >>> drift.update(torch.rand(4, 14, 14), torch.rand(4, 14, 14))
        >>> 0 <= drift.compute() <= 1
        tensor(True)
        >>> drift.higher_is_better, drift.plot_lower_bound, drift.plot_upper_bound
        (True, 0, 1)
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor
    degenerate: Tensor

    def __init__(self, metric: str | DriftMetric, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(metric, str) and metric not in METRICS:
            raise ValueError(f"Expected `metric` to be one of {', '.join(METRICS)}, but got {metric!r}.")
        if not isinstance(metric, str | DriftMetric):
            raise TypeError(f"Expected `metric` to be a name or a `DriftMetric`, but got {metric!r:.80}.")
        self.metric = METRICS[metric] if isinstance(metric, str) else metric
        for state in ("total", "count", "degenerate"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    # Properties, as torchmetrics lets no instance set them.
    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """Whether a higher value means less drift; None for a metric whose unchanged value is neither of its bounds."""
        if self.metric.unchanged == self.metric.highest:
            return True
        return False if self.metric.unchanged == self.metric.lowest else None

    @property
    def plot_lower_bound(self) -> float | None:  # type: ignore[override]
        """Lower end of the axis in `plot()`."""
        return self.metric.lowest

    @property
    def plot_upper_bound(self) -> float | None:  # type: ignore[override]
        """Upper end of the axis in `plot()`."""
        return self.metric.highest

    def update(self, maps: Tensor, reference: Tensor) -> None:
        """Take in maps and what they are compared with, (B, grid_h, grid_w) both."""
        values = self.metric(maps, reference)
        finite = values.isfinite()
        self.total += values[finite].sum()
        self.count += finite.sum()
        self.degenerate += (~finite).sum()

    def compute(self) -> Tensor:
        """The mean, a float64 scalar."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several of `compute`, as `torchmetrics.Metric.plot` does: a figure and its axes."""
        return self._plot(val, ax)
