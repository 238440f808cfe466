"""Reference levels of a drift measure: the noise floor, and the drift between unrelated images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_CLEAR = 0.8


def noise_floor(maps: Tensor, mirrored: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of `measure` under a change that should not matter: each image seen in a mirror.

    Args:
        maps: (B, grid_h, grid_w).
        mirrored: Maps of the same images mirrored left to right, mirrored back, (B, grid_h, grid_w).
        measure: One of `drift.METRICS`.
    """
    return torch.nanmean(measure(maps, mirrored)).item()


def unrelated_level(maps: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of `measure` between maps of different images under one model; NaN for a single image.

    Each image is compared with the next one and with one half the batch away, so that the cost grows with B and not
    with its square. Positional bias keeps it away from the measure's worst value.
    """
    shifts = {1, len(maps) // 2} - {0, len(maps)}
    values = [measure(maps, maps.roll(shift, dims=0)) for shift in shifts]
    return torch.nanmean(torch.cat(values)).item() if values else math.nan


def on_scale(drift: float, noise: float, unrelated: float, unchanged: float) -> float:
    """Drift on the scale on which 0 is noise and 1 is unrelated; below 0, it is less than the noise.

    NaN where there is no such scale: where a mirror changes maps by 80 % of what another image does, or more.

    Args:
        drift: Value of a measure.
        noise: Its noise floor.
        unrelated: Its unrelated level.
        unchanged: What it gives for a map and itself.

    Example:
        >>> on_scale(0.6, noise=0.9, unrelated=0.3, unchanged=1.0)
        0.5
    """
    if not abs(noise - unchanged) < _CLEAR * abs(unrelated - unchanged):
        return math.nan
    return (drift - noise) / (unrelated - noise)
