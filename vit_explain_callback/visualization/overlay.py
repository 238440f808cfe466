"""Pictures of maps: images for display, overlays, differences, and the strip of text that goes with them.

Pictures are uint8 arrays (H, W, 3). Maps are drawn as multiples of uniform: divided by their sum and multiplied by the
number of patches. Colour limits are the caller's, so that they can be shared over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture: TypeAlias = NDArray[np.uint8]

MAP_COLOURS = "inferno"
DIFFERENCE_COLOURS = "RdBu_r"
STRIP_HEIGHT = 18
_INK = (32, 32, 32)
_PAPER = 255


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
    scale, offset = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in (std, mean))
    pixels = (image.detach().cpu().float() * scale + offset).clamp(0, 1) * 255
    return pixels.round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()


def range_of(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation to undo, of images (B, C, H, W) with an unknown one: their range becomes 0 to 1."""
    low, high = images.amin().item(), images.amax().item()
    scale = 1 / max(high - low, 1e-6)
    return [-low * scale] * images.shape[1], [scale] * images.shape[1]


def colour_limit(maps: Tensor) -> float:
    """Upper end of the colour scale for maps (B, grid_h, grid_w) like these: the 99th percentile, at least 2 x uniform.

    Robust against the single bright patches of artifact tokens. Maps with no sum to divide by are left out.
    """
    values = _times_uniform(maps).flatten()
    values = values[values.isfinite()]
    return max(2.0, values.quantile(0.99).item()) if len(values) else 2.0


def overlay(picture: Picture, relevance: Tensor, limit: float, alpha: float = 0.6) -> Picture:
    """Lay a map (grid_h, grid_w) over the greyscale picture: one flat colour a patch, from 0 to `limit` × uniform.

    A map that is zero or not finite is shown as the plain grey picture.
    """
    values = _times_uniform(relevance) / limit
    return _blend(picture, values, MAP_COLOURS, alpha)


def difference(picture: Picture, relevance: Tensor, reference: Tensor, limit: float, alpha: float = 0.7) -> Picture:
    """Lay `relevance` − `reference` over the greyscale picture: red gained, blue lost, ends at ± `limit` × uniform."""
    values = (_times_uniform(relevance) - _times_uniform(reference)) / limit
    return _blend(picture, values / 2 + 0.5, DIFFERENCE_COLOURS, alpha)


def with_strip(picture: Picture, text: str) -> Picture:
    """The picture with a line of text under it, cut to its width."""
    height, width, _ = picture.shape
    canvas = Image.new("RGB", (width, height + STRIP_HEIGHT), (_PAPER,) * 3)
    canvas.paste(Image.fromarray(picture), (0, 0))
    write(canvas, text, (3, height + 2), width - 6)
    return np.asarray(canvas)


def write(canvas: Image.Image, text: str, place: tuple[int, int], width: int) -> None:
    """Write one line at `place` = (x, y), shortened with an ellipsis to `width` pixels."""
    if _font().getlength(text) > width:
        while text and _font().getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    ImageDraw.Draw(canvas).text(place, text, fill=_INK, font=_font())


def resized(picture: Picture, height: int, width: int) -> Picture:
    """The picture at another size; enlarged pixels stay sharp."""
    larger = height >= picture.shape[0]
    method = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def colour_bar(limit: float, width: int, colours: str = MAP_COLOURS) -> Picture:
    """A horizontal bar of the map colours with its ends named, `STRIP_HEIGHT` high."""
    canvas = Image.new("RGB", (width, STRIP_HEIGHT), (_PAPER,) * 3)
    bar = _coloured(np.linspace(0, 1, 120)[None].repeat(STRIP_HEIGHT - 6, axis=0), colours)
    write(canvas, "0", (3, 2), 12)
    canvas.paste(Image.fromarray((bar * 255).astype(np.uint8)), (15, 3))
    write(canvas, f"{limit:.3g} x uniform", (140, 2), width - 143)
    return np.asarray(canvas)


def _times_uniform(maps: Tensor) -> Tensor:
    """Maps (…, grid_h, grid_w) in multiples of uniform relevance; NaN where the sum is zero or not finite."""
    maps = maps.detach().cpu().double()
    return maps / maps.sum(dim=(-2, -1), keepdim=True) * maps.shape[-2] * maps.shape[-1]


def _blend(picture: Picture, values: Tensor, colours: str, alpha: float) -> Picture:
    height, width, _ = picture.shape
    grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float64)[..., None] / 255
    if not values.isfinite().all():
        return (grey.repeat(3, axis=2) * 255).round().astype(np.uint8)
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    coloured = _coloured(values.clamp(0, 1).numpy(), colours)[rows][:, columns]
    blended: Picture = ((alpha * coloured + (1 - alpha) * grey) * 255).round().astype(np.uint8)
    return blended


def _coloured(values: NDArray[np.float64], colours: str) -> NDArray[np.float64]:
    """Values in [0, 1], of any shape, as RGB in [0, 1] along a new last axis."""
    return np.asarray(matplotlib.colormaps[colours](values))[..., :3]


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=12)
