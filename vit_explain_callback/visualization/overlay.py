"""Lay maps over pictures: an image as a picture, a map in colours over its grey, the contour of a region.

A picture is (H, W, 3) uint8. A map is drawn in multiples of uniform relevance, up to a limit; positive relevance is
purple, negative orange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vit_explain_callback.metrics.maps import is_degenerate

Picture: TypeAlias = NDArray[np.uint8]

LEVELS = 256
_OPACITY = 0.9  # at the ends: the photograph stays visible there too
FLOOR = 0.45
"""The darkest grey of a photograph under colours, in [0, 1]."""
# From weak to strong, in equal steps; lightness falls all along.
_PURPLE = ("#e070ff", "#b038f5", "#7a1fe0", "#4a12c0", "#220a8a")
_ORANGE = ("#ffb000", "#f07f09", "#c8500a", "#8a3000", "#4f1800")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_THICKNESS = 2  # pixels of each line of a contour
_LINE = (0, 120, 90)
_HALO = (255, 255, 255)


def unnormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Picture:
    """A normalised (C, H, W) image as the picture it was; one channel gives grey.

    Raises:
        ValueError: If the numbers of channels do not match, or are neither 1 nor 3.
    """
    channels = len(image)
    if channels not in (1, 3) or {len(mean), len(std)} != {channels}:
        raise ValueError(
            f"Expected `mean` and `std` with one value for each image channel (1 or 3), but got {len(mean)} and "
            f"{len(std)} for {channels}."
        )
    deviation, offset = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in (std, mean))
    pixels = (image.detach().cpu().float() * deviation + offset).clamp(0, 1) * 255
    return pixels.round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()


def shown_bands(images: Tensor) -> Tensor:
    """The channels of images (B, C, H, W) that are shown: the first three, or one where there are fewer.

    Example:
        >>> [shown_bands(torch.zeros(1, channels, 2, 2)).shape[1] for channels in (1, 2, 3, 4, 13)]
        [1, 1, 3, 3, 3]
    """
    return images[:, : 3 if images.shape[1] >= 3 else 1]


def range_of(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation with which `unnormalise` maps the range of images (B, C, H, W) to 0 … 1."""
    low, high = images.amin().item(), images.amax().item()
    deviation = 1 / max(high - low, 1e-6)
    return [-low * deviation] * images.shape[1], [deviation] * images.shape[1]


def resized(picture: Picture, height: int, width: int) -> Picture:
    """The picture at another size; enlarged pixels stay sharp."""
    larger = height >= picture.shape[0]
    method = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def times_uniform(maps: Tensor) -> Tensor:
    """Maps (B, grid_h, grid_w) in multiples of uniform relevance, float64 on the CPU: P × map / Σ|map|.

    Degenerate maps (see `metrics.maps`) become NaN.
    """
    raw = maps.detach().cpu().double()  # on the CPU first: not every device has float64
    values = raw / raw.abs().mean(dim=(1, 2), keepdim=True)
    return values.masked_fill(is_degenerate(raw)[:, None, None], torch.nan)


def colour_limit(maps: Tensor) -> float:
    """End of the colour scale for maps (B, grid_h, grid_w) like these, in multiples of uniform relevance.

    The 99th percentile of the magnitudes, at least 2: robust against the single bright patches of artifact tokens.
    Degenerate maps are left out.
    """
    values = times_uniform(maps).abs().flatten()
    values = values[values.isfinite()]
    return max(2.0, float(np.quantile(values.numpy(), 0.99))) if len(values) else 2.0


def _table(colours: tuple[str, ...]) -> NDArray[np.float64]:
    stops = np.array([[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in colours]) / 255
    places = np.linspace(0, 1, LEVELS)
    rgb = [np.interp(places, np.linspace(0, 1, len(colours)), stops[:, channel]) for channel in range(3)]
    return np.stack([*rgb, _OPACITY * places], axis=1)


POSITIVE = _table(_PURPLE)
"""Red, green, blue and opacity in [0, 1] of the magnitudes 0, 1/255, …, 1 of positive relevance, (256, 4)."""

NEGATIVE = _table(_ORANGE)
"""The same of negative relevance."""


def relevance_colours(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colour and opacity of values of any shape, clipped to [-1, 1], along a new last axis of 4."""
    index = (np.clip(np.abs(values), 0, 1) * (LEVELS - 1)).round().astype(int)
    colours: NDArray[np.float64] = np.where((values < 0)[..., None], NEGATIVE[index], POSITIVE[index])
    return colours


def backdrop(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The light grey in [0, 1] that colours are laid over, (H, W): 0.45 + 0.55 × luma of a picture (H, W, 3)."""
    grey: NDArray[np.float64] = FLOOR + (1 - FLOOR) * (picture @ np.array(_LUMA)) / 255
    return grey


def blend(grey: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values in [-1, 1] laid over a grey in [0, 1] of the same shape (H, W), as a picture (H, W, 3)."""
    colours = relevance_colours(values)
    opacity = colours[..., 3:]
    mixed: NDArray[np.uint8] = (
        ((opacity * colours[..., :3] + (1 - opacity) * grey[..., None]) * 255).round().astype(np.uint8)
    )
    return mixed


def overlay(picture: Picture, relevance: Tensor, limit: float) -> Picture:
    """Lay a map (grid_h, grid_w) over a picture in light grey: one colour a patch, the more opaque the stronger.

    Positive relevance is purple and negative orange, both from 0 to `limit` × uniform. A degenerate map
    leaves the plain grey picture.
    """
    return _laid_over(picture, times_uniform(relevance[None])[0] / limit)


def difference(picture: Picture, relevance: Tensor, reference: Tensor, limit: float) -> Picture:
    """Lay `relevance` − `reference` over the grey picture: purple gained, orange lost, ends at ± `limit` × uniform."""
    now, before = times_uniform(torch.stack([relevance, reference]))
    return _laid_over(picture, (now - before) / limit)


def outlined(picture: Picture, mask: Tensor) -> Picture:
    """Draw the contour of a region given by its mask (h, w), boolean: a dark line within it, a bright one around it."""
    height, width, _ = picture.shape
    inside = _enlarged(mask.cpu().numpy().astype(bool), height, width)
    result = picture.copy()
    result[_grown(inside, _THICKNESS) & ~inside] = _HALO
    result[_grown(~inside, _THICKNESS, beyond=True) & inside] = _LINE
    return result


def _laid_over(picture: Picture, values: Tensor) -> Picture:
    height, width, _ = picture.shape
    return blend(backdrop(picture), _enlarged(values.nan_to_num(0).numpy(), height, width))


def _enlarged(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Values (h, w) at the size of a picture, each as a flat block."""
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    enlarged: NDArray[Any] = values[rows][:, columns]
    return enlarged


def _grown(mask: NDArray[np.bool_], pixels: int, beyond: bool = False) -> NDArray[np.bool_]:
    """A mask (H, W) grown by some pixels up, down, left and right; `beyond` is its value outside the picture."""
    for _ in range(pixels):
        padded = np.pad(mask, 1, constant_values=beyond)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask
