"""The colour scale of relevance, and the grey of the photograph under it.

Grey is the photograph and colour is relevance, so that neither is taken for the other. Relevance is purple and negative
relevance orange, which colour-blind people see as blue and yellow. The opacity grows with the magnitude: zero leaves
the photograph as it is. The backdrop is nowhere darker than `FLOOR`, and both ends of the scale are darker than that:
what is strongest stands out by lightness alone too.

`tests/benchmarks/overlay_designs.py` compares this design with others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 256
_OPACITY = 0.9  # at the ends: the photograph stays visible there too
FLOOR = 0.45
"""The darkest grey of a photograph under colours, in [0, 1]."""
# From weak to strong, in equal steps; lightness falls all along.
_PURPLE = ("#e070ff", "#b038f5", "#7a1fe0", "#4a12c0", "#220a8a")
_ORANGE = ("#ffb000", "#f07f09", "#c8500a", "#8a3000", "#4f1800")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def _table(colours: tuple[str, ...]) -> NDArray[np.float64]:
    stops = np.array([[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in colours]) / 255
    places = np.linspace(0, 1, LEVELS)
    rgb = [np.interp(places, np.linspace(0, 1, len(colours)), stops[:, channel]) for channel in range(3)]
    return np.stack([*rgb, _OPACITY * places], axis=1)


POSITIVE = _table(_PURPLE)
"""Red, green, blue and opacity in [0, 1] of the magnitudes 0, 1/255, …, 1 of positive relevance, (256, 4)."""

NEGATIVE = _table(_ORANGE)
"""The same of negative relevance."""


def scale(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colour and opacity of values in [-1, 1] of any shape, along a new last axis of 4; what is beyond is clipped."""
    index = (np.clip(np.abs(values), 0, 1) * (LEVELS - 1)).round().astype(int)
    colours: NDArray[np.float64] = np.where((values < 0)[..., None], NEGATIVE[index], POSITIVE[index])
    return colours


def backdrop(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The light grey in [0, 1] that colours are laid over, (H, W): 0.45 + 0.55 × luma of a picture (H, W, 3)."""
    grey: NDArray[np.float64] = FLOOR + (1 - FLOOR) * (picture @ np.array(_LUMA)) / 255
    return grey


def blend(grey: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values in [-1, 1] laid over a grey in [0, 1] of the same shape (H, W), as a picture (H, W, 3)."""
    colours = scale(values)
    opacity = colours[..., 3:]
    mixed: NDArray[np.uint8] = (
        ((opacity * colours[..., :3] + (1 - opacity) * grey[..., None]) * 255).round().astype(np.uint8)
    )
    return mixed
