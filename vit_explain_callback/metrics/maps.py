"""What can be measured on explanation maps at all, and the parts that measures share.

Maps are (B, grid_h, grid_w), non-negative, measured image by image on the native patch grid; results are (B,) in
float64. A map that carries no ranking (not finite, sum at most 1e-12, or flat: range at most 1e-6 of its maximum) is
degenerate, and everything measured on it is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def is_degenerate(maps: Tensor) -> Tensor:
    """Which maps nothing can be measured on, (B,) boolean.

    Example:
        >>> is_degenerate(torch.tensor([[[0.0, 0.0]], [[0.2, 0.2]], [[0.1, 0.3]], [[float("nan"), 1.0]]]))
        tensor([ True,  True, False,  True])
    """
    flat = maps.double().flatten(1)
    low, high = flat.amin(dim=1), flat.amax(dim=1)
    useful = flat.isfinite().all(dim=1) & (flat.sum(dim=1) > 1e-12) & (high - low > 1e-6 * high)
    return ~useful


def measured(measure: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Apply `measure` to the images whose maps are all worth measuring, NaN for the others.

    Args:
        measure: Takes one (b, P) tensor of distributions for each of `maps`: its maps divided by their sums.
        maps: One or more (B, grid_h, grid_w) of one shape.

    Raises:
        ValueError: If they are of another shape, or of several.
    """
    shapes = [tuple(m.shape) for m in maps]
    if len(shapes[0]) != 3 or len(set(shapes)) > 1:
        raise ValueError(
            f"Expected maps of {'one shape ' if len(maps) > 1 else ''}(B, grid_h, grid_w), but got "
            f"{' and '.join(map(str, shapes))}."
        )
    useful = ~torch.stack([is_degenerate(m) for m in maps]).any(dim=0)
    result = torch.full((len(useful),), math.nan, dtype=torch.float64, device=useful.device)
    if useful.any():
        flat = [m.double().flatten(1)[useful].clamp(min=0) for m in maps]
        result[useful] = measure(*(m / m.sum(dim=1, keepdim=True) for m in flat)).double()
    return result


def strongest_tenth(p: Tensor) -> Tensor:
    """(b, P) boolean: the strongest tenth of each row's patches, at least one."""
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
