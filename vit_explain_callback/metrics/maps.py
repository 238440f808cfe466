"""Maps that can be measured, and the helpers that metrics share.

Maps are (B, grid_h, grid_w), measured image by image on the native patch grid; results are (B,) in float64. A map that
carries no ranking (not finite, magnitudes that sum to at most 1e-12, or flat: range at most 1e-6 of its greatest
magnitude) is degenerate, and everything measured on it is NaN.

Some methods give maps of both signs, where a negative patch speaks against the class.

- Metrics that rank patches, or compare maps as vectors, take the values with their sign: patches against the class
  come last.
- Metrics of a distribution over patches take the positive part divided by its sum: the evidence for the class.
  Evidence against it is no place that a map points to, and magnitudes would mix the two. Without a
  positive part (a sum of at most 1e-12), these metrics are NaN.

For maps without negative values both are the map itself.

Maps of pixels are pooled before they are measured (`pooled`): neighbouring pixels of a gradient differ by chance, and a
metric that ranks each of them would call that drift. Grids of patches and of a CNN's features are measured as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_NOTHING = 1e-12
MOST_CELLS = 64
"""A side that has more cells is pooled before it is measured."""


def is_degenerate(maps: Tensor) -> Tensor:
    """Which maps are degenerate, (B,) boolean.

    Example:
        >>> is_degenerate(torch.tensor([[[0.0, 0.0]], [[0.2, 0.2]], [[0.1, 0.3]], [[float("nan"), 1.0]]]))
        tensor([ True,  True, False,  True])
    """
    flat = maps.double().flatten(1)
    size = flat.abs()
    value_range = flat.amax(dim=1) - flat.amin(dim=1)
    useful = flat.isfinite().all(dim=1) & (size.sum(dim=1) > _NOTHING) & (value_range > 1e-6 * size.amax(dim=1))
    return ~useful


def pooled(maps: Tensor) -> Tensor:
    """Maps as they are measured: means over squares of cells, the smallest that leave 64 or fewer a side.

    Args:
        maps: (B, h, w).

    Returns:
        (B, ceil(h / k), ceil(w / k)) with k = ceil(max(h, w) / 64); the maps themselves where k is 1.

    Example:
        >>> pooled(torch.rand(2, 224, 224)).shape, pooled(torch.rand(2, 14, 14)).shape
        (torch.Size([2, 56, 56]), torch.Size([2, 14, 14]))
    """
    height, width = maps.shape[1:]
    side = math.ceil(max(height, width) / MOST_CELLS)
    if side == 1:
        return maps
    return F.adaptive_avg_pool2d(maps[:, None], (math.ceil(height / side), math.ceil(width / side)))[:, 0]


def on_distributions(metric: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Apply `metric` to the distributions of images whose maps all have one; NaN for the others.

    Args:
        metric: Takes one (b, P) tensor of distributions for each of `maps`: its positive parts divided by their sums.
        maps: One or more (B, grid_h, grid_w) of one shape.

    Raises:
        ValueError: If they are of another shape, or of several.
    """
    _check_shapes(maps)
    positive = [m.clamp(min=0) for m in maps]
    nothing = torch.stack([m.double().sum(dim=(1, 2)) <= _NOTHING for m in positive]).any(dim=0)
    useful = ~(nothing | torch.stack([is_degenerate(m) for m in maps]).any(dim=0))
    return _on_useful(useful, lambda *parts: metric(*(p / p.sum(dim=1, keepdim=True) for p in parts)), positive)


def on_values(metric: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Apply `metric` to the signed values of images none of whose maps is degenerate; NaN for the others.

    Args:
        metric: Takes one (b, P) tensor for each of `maps`: its values divided by the greatest magnitude.
        maps: One or more (B, grid_h, grid_w) of one shape.

    Raises:
        ValueError: If they are of another shape, or of several.
    """
    _check_shapes(maps)
    useful = ~torch.stack([is_degenerate(m) for m in maps]).any(dim=0)
    return _on_useful(useful, lambda *parts: metric(*(p / p.abs().amax(dim=1, keepdim=True) for p in parts)), maps)


def _check_shapes(maps: Sequence[Tensor]) -> None:
    shapes = [tuple(m.shape) for m in maps]
    if len(shapes[0]) != 3 or len(set(shapes)) > 1:
        raise ValueError(
            f"Expected maps of {'one shape ' if len(maps) > 1 else ''}(B, grid_h, grid_w), but got "
            f"{' and '.join(map(str, shapes))}."
        )


def _on_useful(useful: Tensor, metric: Callable[..., Tensor], maps: Sequence[Tensor]) -> Tensor:
    """(B,): what `metric` gives for the `useful` images of maps, each as (b, P) in float64, and NaN for the others."""
    result = torch.full((len(useful),), math.nan, dtype=torch.float64, device=useful.device)
    if useful.any():
        result[useful] = metric(*(m.double().flatten(1)[useful] for m in maps)).double()
    return result


def strongest_tenth(p: Tensor) -> Tensor:
    """(b, P) boolean: the tenth of each row's patches with the greatest values, at least one."""
    count = max(1, round(p.shape[1] / 10))
    return torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(count, dim=1).indices, True)


def patch_places(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(P, 2) row and column of each patch in float64, row by row.

    Example:
        >>> patch_places((1, 2)).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    rows, columns = (torch.arange(size, dtype=torch.float64, device=device) for size in grid)
    return torch.cartesian_prod(rows, columns)
