"""Procedural images for the examples: one flat-coloured shape on a textured background.

Every image comes with the mask of its object. `Shapes(shortcut=...)` can also plant a shortcut: a square in the
top-left corner whose colour names a class.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SIZE = 96
PATCH_SIZE = 8
CORNER = 2 * PATCH_SIZE
"""Side of the shortcut square in pixels: two by two patches."""
MEAN = STD = (0.5, 0.5, 0.5)

PRETRAIN_CLASSES = ("disc", "triangle", "square", "star4", "star6", "cross", "ring", "bar")
FINETUNE_CLASSES = ("pentagon", "hexagon", "star5", "star7")
CORNER_COLOURS = ((214, 69, 65), (63, 145, 77), (58, 104, 190), (226, 184, 60))

Shortcut = Literal["label", "random", "wrong", "none"]


def _polygon(corners: int, inner: float = 1.0) -> NDArray[np.float64]:
    """Unit polygon; `inner` < 1 pulls in a vertex between every two corners, which makes a star."""
    count = corners if inner == 1.0 else 2 * corners
    angle = 2 * math.pi * np.arange(count) / count
    radius = np.where(np.arange(count) % 2 == 0, 1.0, inner) if inner != 1.0 else np.ones(count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _box(half_width: float, half_height: float) -> NDArray[np.float64]:
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64)
    return signs * (half_width, half_height)


_OUTLINES: dict[str, list[NDArray[np.float64]]] = {
    "disc": [_polygon(48)],
    "ring": [_polygon(48)],
    "triangle": [_polygon(3)],
    "square": [_polygon(4)],
    "pentagon": [_polygon(5)],
    "hexagon": [_polygon(6)],
    "star4": [_polygon(4, 0.4)],
    "star5": [_polygon(5, 0.45)],
    "star6": [_polygon(6, 0.55)],
    "star7": [_polygon(7, 0.6)],
    "cross": [_box(1.0, 0.33), _box(0.33, 1.0)],
    "bar": [_box(1.0, 0.3)],
}


def _texture(rng: np.random.Generator) -> NDArray[np.float64]:
    """(IMAGE_SIZE, IMAGE_SIZE, 3) background in [0, 255]: two muted colours mixed by a few random waves."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / IMAGE_SIZE
    waves = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    for _ in range(5):
        frequency = rng.uniform(2, 14) * np.array([math.cos(a := rng.uniform(0, math.pi)), math.sin(a)])
        waves += rng.uniform(0.4, 1) * np.sin(2 * math.pi * (frequency[0] * x + frequency[1] * y + rng.uniform()))
    weight = 1 / (1 + np.exp(-1.5 * waves))[..., None]
    first, second = rng.uniform(60, 200, size=(2, 3))
    grain = rng.normal(0, 8, size=(IMAGE_SIZE, IMAGE_SIZE, 1))
    texture: NDArray[np.float64] = first * weight + second * (1 - weight) + grain
    return texture


def _draw_shape(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """(IMAGE_SIZE, IMAGE_SIZE) coverage in [0, 1] of a shape of random size, place and rotation."""
    scale = 4  # drawn larger and averaged down, for smooth edges
    radius = rng.uniform(14, 24)
    # The shape stays clear of the corner square, so object and shortcut never overlap.
    low = CORNER + radius * 0.75
    centre = rng.uniform(low, IMAGE_SIZE - radius, size=2)
    angle = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    canvas = Image.new("L", (IMAGE_SIZE * scale, IMAGE_SIZE * scale))
    pen = ImageDraw.Draw(canvas)
    for outline in _OUTLINES[name]:
        points = (outline @ rotation.T * radius + centre) * scale
        pen.polygon([(float(px), float(py)) for px, py in points], fill=255)
    if name == "ring":
        points = (_OUTLINES["disc"][0] * radius * 0.55 + centre) * scale
        pen.polygon([(float(px), float(py)) for px, py in points], fill=0)
    return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), dtype=np.float64) / 255


class Shapes(Dataset[tuple[Tensor, int, Tensor]]):
    """Images of shapes, each drawn from `(seed, index)` alone, so that any item is reproducible.

    Args:
        classes: Names of the shapes; the label is the position in this sequence.
        length: Number of images; labels go round the classes.
        seed: Selects the images.
        shortcut: Colour of the corner square: that of the `"label"`, a `"random"` class, a `"wrong"` class, or no
            square (`"none"`).

    Items are `(image, label, mask)`: image (3, 96, 96) normalised with `MEAN` and `STD`, mask (96, 96) boolean.
    """

    def __init__(self, classes: tuple[str, ...], length: int, seed: int, shortcut: Shortcut = "none") -> None:
        self.classes = classes
        self.length = length
        self.seed = seed
        self.shortcut: Shortcut = shortcut

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        label = index % len(self.classes)
        coverage = _draw_shape(self.classes[label], rng)[..., None]
        pixels = _texture(rng) * (1 - coverage) + rng.uniform(0, 255, size=3) * coverage
        hint = self._corner_class(label, rng)
        if hint is not None:
            pixels[:CORNER, :CORNER] = CORNER_COLOURS[hint]
        image = torch.from_numpy(pixels.clip(0, 255) / 255).permute(2, 0, 1).float()
        return (image - 0.5) / 0.5, label, torch.from_numpy(coverage[..., 0] > 0.5)

    def _corner_class(self, label: int, rng: np.random.Generator) -> int | None:
        count = len(CORNER_COLOURS)
        if self.shortcut == "label":
            return label
        if self.shortcut == "random":
            return int(rng.integers(count))
        if self.shortcut == "wrong":
            return (label + int(rng.integers(1, count))) % count
        return None
