"""How far explanation maps have moved: measures between two sets of maps, and statistics of one.

Maps are (B, grid_h, grid_w), non-negative, compared image by image on the native patch grid; results are (B,) in
float64. A map that carries no ranking (not finite, sum at most 1e-12, or flat: range at most 1e-6 of its maximum) is
degenerate, and everything measured on it is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.regression import jensen_shannon_divergence, spearman_corrcoef


def is_degenerate(maps: Tensor) -> Tensor:
    """Which maps nothing can be measured on, (B,) boolean.

    Example:
        >>> is_degenerate(torch.tensor([[[0.0, 0.0]], [[0.2, 0.2]], [[0.1, 0.3]], [[float("nan"), 1.0]]]))
        tensor([ True,  True, False,  True])
    """
    flat = _flat(maps)
    low, high = flat.amin(dim=1), flat.amax(dim=1)
    useful = flat.isfinite().all(dim=1) & (flat.sum(dim=1) > 1e-12) & (high - low > 1e-6 * high)
    return ~useful


def spearman(maps: Tensor, reference: Tensor) -> Tensor:
    """Spearman rank correlation, in [-1, 1]; 1 means that patches rank alike, and lower means more drift.

    Invariant to any increasing transform of either map. NaN where a map is degenerate.
    """
    return _measured(maps, reference, lambda p, q: spearman_corrcoef(p.T, q.T).reshape(-1))


def jensen_shannon(maps: Tensor, reference: Tensor) -> Tensor:
    """Jensen–Shannon divergence divided by ln 2, in [0, 1]; 0 means equal, and higher means more drift.

    ½ KL(p‖m) + ½ KL(q‖m) with p, q the maps divided by their sums and m their mean. Invariant to scale.
    NaN where a map is degenerate.
    """
    return _measured(
        maps, reference, lambda p, q: jensen_shannon_divergence(p, q, reduction="none").clamp(min=0) / math.log(2)
    )


def top10_iou(maps: Tensor, reference: Tensor) -> Tensor:
    """Intersection over union of the two sets of strongest patches, in [0, 1]; lower means more drift.

    Each set holds the strongest tenth of the patches, at least one. Invariant to any increasing transform.
    NaN where a map is degenerate.
    """

    def measure(p: Tensor, q: Tensor) -> Tensor:
        both = (_strongest(p) & _strongest(q)).sum(dim=1)
        return both / (2 * _tenth(p) - both)

    return _measured(maps, reference, measure)


def centroid_shift(maps: Tensor, reference: Tensor) -> Tensor:
    """Distance between the centres of mass, divided by the grid's diagonal, in [0, 1]; higher means more drift.

    The diagonal joins the centres of opposite corner patches. Invariant to scale. NaN where a map is degenerate.
    """
    height, width = maps.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([y, x], dim=-1).reshape(-1, 2).to(maps.device, torch.float64)
    diagonal = math.hypot(height - 1, width - 1)
    return _measured(maps, reference, lambda p, q: ((p - q) @ places).norm(dim=1) / diagonal)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": spearman,
    "jensen_shannon": jensen_shannon,
    "top10_iou": top10_iou,
    "centroid_shift": centroid_shift,
}
"""Every drift measure by the name it has in TensorBoard."""


def map_statistics(maps: Tensor) -> dict[str, Tensor]:
    """Shape of each map, as (B,) tensors; `entropy` and `top10_mass` are NaN where a map is degenerate.

    - `entropy`: −Σ p ln p / ln P of the map divided by its sum, in [0, 1]; 1 is uniform.
    - `top10_mass`: share of the sum on the strongest tenth of the patches, in [0.1, 1].
    - `patch_mass`: the sum itself, in [0, 1]: what a rollout leaves on the patches instead of the prefix tokens. For
      gradient rollout it falls with the gradients, as when the target's probability nears 1.
    - `degenerate`: 1 where the map is degenerate, else 0.
    """
    patches = maps[0].numel()
    return {
        "entropy": _measured(maps, maps, lambda p, _: torch.special.entr(p).sum(dim=1) / math.log(patches)),
        "top10_mass": _measured(maps, maps, lambda p, _: (p * _strongest(p)).sum(dim=1)),
        "patch_mass": maps.double().sum(dim=(1, 2)),
        "degenerate": is_degenerate(maps).double(),
    }


def _measured(maps: Tensor, reference: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply `measure` to the rows of both that are worth measuring, as (b, P) distributions; NaN elsewhere."""
    if maps.ndim != 3 or maps.shape != reference.shape:
        raise ValueError(
            "Expected `maps` and `reference` of one shape (B, grid_h, grid_w), but got "
            f"{tuple(maps.shape)} and {tuple(reference.shape)}."
        )
    useful = ~(is_degenerate(maps) | is_degenerate(reference))
    result = torch.full((len(maps),), math.nan, dtype=torch.float64, device=maps.device)
    if useful.any():
        p, q = (_flat(m)[useful].clamp(min=0) for m in (maps, reference))
        result[useful] = measure(p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)).double()
    return result


def _flat(maps: Tensor) -> Tensor:
    return maps.double().flatten(1)


def _tenth(p: Tensor) -> int:
    return max(1, round(p.shape[1] / 10))


def _strongest(p: Tensor) -> Tensor:
    """(b, P) boolean: the strongest tenth of each row's patches."""
    return torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(_tenth(p), dim=1).indices, True)
