"""Reference levels of a drift metric: the noise floor, and the drift between unrelated images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_CLEAR = 0.8
_NOISE = 0.05


def nudged(images: Tensor, grid: tuple[int, int], mirror: bool = False) -> Tensor:
    """Images with a change that should not matter, to measure the noise of maps.

    Each is shifted to the right and down by an eighth of a patch, at least a pixel, its edge repeated, and given
    Gaussian noise of a twentieth of its own standard deviation, the same in every call.

    Args:
        images: (B, C, H, W).
        grid: Patches as (grid_h, grid_w).
        mirror: Whether to mirror them left to right first; maps then have to be mirrored back.

    Returns:
        (B, C, H, W), of the dtype and on the device of `images`.
    """
    values = (images.flip(-1) if mirror else images).cpu().float()
    down, right = (max(1, size // (8 * cells)) for size, cells in zip(images.shape[2:], grid, strict=True))
    values = shifted(values, down, right)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return (values + _NOISE * values.std(dim=(1, 2, 3), keepdim=True) * noise).to(images)


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Images (B, C, H, W) moved by some pixels, their edge repeated."""
    return F.pad(images, (right, 0, down, 0), mode="replicate")[..., : images.shape[2], : images.shape[3]]


def output_holds(logits: Tensor, changed: Tensor) -> bool:
    """Whether a change of the images moves the model's output less than half as far as another image does.

    Root mean squares of the Euclidean distance are compared. A single image cannot tell.

    Args:
        logits: (B, C) of the images.
        changed: (B, C) of the changed images.
    """
    logits, changed = logits.double(), changed.double()
    moved = (changed - logits).pow(2).sum(dim=1).mean()
    between = 2 * logits.var(dim=0).sum() if len(logits) > 1 else torch.zeros(())
    return bool(moved < between / 4)


def noise_floor(maps: Tensor, of_nudged: Tensor, metric: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of `metric` under a change that should not matter.

    Args:
        maps: (B, grid_h, grid_w).
        of_nudged: Maps of the same images `nudged`, mirrored back if they were, (B, grid_h, grid_w).
        metric: One of `drift.METRICS`.
    """
    return torch.nanmean(metric(maps, of_nudged)).item()


def unrelated_level(maps: Tensor, metric: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of `metric` between maps of different images under one model; NaN for a single image.

    Each image is compared with the next one and with one half the batch away, so that the cost grows with B and not
    with its square. Positional bias keeps it away from the metric's worst value.
    """
    shifts = {1, len(maps) // 2} - {0, len(maps)}
    values = [metric(maps, maps.roll(shift, dims=0)) for shift in shifts]
    return torch.nanmean(torch.cat(values)).item() if values else math.nan


def on_scale(drift: float, noise: float, unrelated: float, unchanged: float) -> float:
    """Drift on the scale on which 0 is noise and 1 is unrelated; below 0, it is less than the noise.

    NaN where there is no such scale: where noise changes maps by 80 % of what another image does, or more.

    Args:
        drift: Value of a metric.
        noise: Its noise floor.
        unrelated: Its unrelated level.
        unchanged: Its value for a map and itself.

    Example:
        >>> on_scale(0.6, noise=0.9, unrelated=0.3, unchanged=1.0)
        0.5
    """
    if not abs(noise - unchanged) < _CLEAR * abs(unrelated - unchanged):
        return math.nan
    return (drift - noise) / (unrelated - noise)
