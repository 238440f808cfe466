"""Read photographs, find the part that a model sees, and draw maps on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from vit_explain_callback.visualization.overlay import Picture, backdrop, overlay

Transform: TypeAlias = Callable[[Image.Image], Tensor]
Box: TypeAlias = tuple[float, float, float, float]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_LONGER_SIDE = (320, 640)  # pixels of the displayed picture: minimum and maximum
_FAINT = 0.3  # contrast outside the part that the model sees
_OUTLINE = (140, 140, 140)
_RAMP_SIDE = 32


def image_files(folder: Path) -> list[Path]:
    """List the files in a folder and its subfolders that have an image suffix, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_image(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB, rotated by its EXIF orientation, with white for transparency.

    16-bit grey is scaled from its full range, floating-point grey from the range of the image.

    Raises:
        OSError: If the file does not exist, is not an image or is broken.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):
                return _to_8_bit(image)
            if image.has_transparency_data:
                clear = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise OSError(f"{path} is too large an image: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"{path} cannot be read as an image: {error}") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    low, high = (0.0, 65535.0) if image.mode.startswith("I") else (values.min(), values.max())
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class Photograph:
    """A photograph as it is displayed.

    Attributes:
        path: The file.
        size: (width, height) of the file's image in pixels, after rotation.
        picture: The image with a longer side of 320 to 640 pixels, (H, W, 3).
        box: The part that the model sees, as (left, top, right, bottom) in fractions of width and height.
    """

    path: Path
    size: tuple[int, int]
    picture: Picture
    box: Box

    @classmethod
    def read(cls, path: Path, view: View) -> tuple[Photograph, Tensor]:
        """Read a photograph, and the model's input from it, (C, H, W).

        Raises:
            OSError: If it cannot be read.
        """
        image = read_image(path)
        longer = max(image.size)
        side = min(max(longer, _LONGER_SIDE[0]), _LONGER_SIDE[1])
        shown = image.resize([max(1, round(length * side / longer)) for length in image.size], Image.Resampling.LANCZOS)
        return cls(path, image.size, np.asarray(shown), view.box(image.size)), view.transform(image)

    @property
    def visible_pixels(self) -> tuple[int, int, int, int]:
        """The part that the model sees, clipped to the image, as (left, top, right, bottom) in pixels of the file."""
        width, height = self.size
        pixels = (round(edge * length) for edge, length in zip(self.box, (width, height) * 2, strict=True))
        left, top, right, bottom = pixels
        return max(left, 0), max(top, 0), min(right, width), min(bottom, height)

    def overlay(self, relevance: Tensor, limit: float) -> Picture:
        """Lay a map over the part that the model sees; the rest is faint, outside a thin outline.

        Args:
            relevance: The map, (grid_h, grid_w).
            limit: Upper end of the colour scale, in multiples of uniform relevance.
        """
        height, width, _ = self.picture.shape
        faint = 1 - _FAINT * (1 - backdrop(self.picture))
        canvas = Image.fromarray((faint * 255).round().astype(np.uint8)).convert("RGB")
        left, top, right, bottom = (round(e * n) for e, n in zip(self.box, (width, height) * 2, strict=True))
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        # A model that pads sees more than the photograph: cropping adds the padding, pasting removes it again.
        part = Image.fromarray(self.picture).crop((left, top, right, bottom))
        canvas.paste(Image.fromarray(overlay(np.asarray(part), relevance, limit)), (left, top))
        # A bright photograph looks like the faint part outside.
        ImageDraw.Draw(canvas).rectangle((left - 1, top - 1, right, bottom), outline=_OUTLINE)
        return np.asarray(canvas)


@dataclass(frozen=True)
class View:
    """A model's transform, and the part of a photograph that it uses.

    Attributes:
        transform: Resizes, crops or pads an RGB image, and normalises each channel: (C, H, W).
    """

    transform: Transform
    _boxes: dict[tuple[int, int], Box] = field(default_factory=dict, repr=False)

    def box(self, size: tuple[int, int]) -> Box:
        """The part of an image of `size` = (width, height) that the model sees, as (left, top, right, bottom).

        In fractions of width and height, below 0 or above 1 where the transform pads. Determined by transforming an
        image whose colours encode its coordinates.

        Raises:
            ValueError: If the transform does not keep the image upright or mixes its colours.
        """
        # Resizing blurs the coordinates of an image of a few pixels, so a larger one of the same shape takes its place.
        enlarged = -(-_RAMP_SIDE // min(size))
        width, height = size[0] * enlarged, size[1] * enlarged
        if size not in self._boxes:
            if len(self._boxes) >= 256:
                self._boxes.clear()
            self._boxes[size] = self._find_box(width, height)
        return self._boxes[size]

    @cached_property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel by which the transform normalises."""
        black, white = (self._transform_uniform(value, (256, 256))[:, 128, 128].double() for value in (0, 255))
        std = 1 / (white - black)
        return tuple((-black * std).tolist()), tuple(std.tolist())

    def _transform_uniform(self, value: int, size: tuple[int, int]) -> Tensor:
        return self.transform(Image.new("RGB", size, (value,) * 3))

    def _find_box(self, width: int, height: int) -> Box:
        ramp = np.zeros((height, width, 3), dtype=np.uint8)
        ramp[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
        ramp[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
        black, white = (self._transform_uniform(value, (width, height))[:2].double() for value in (0, 255))
        contrast = white - black
        # Padding does not depend on the image.
        inside = (contrast > 0.99 * contrast.amax(dim=(1, 2), keepdim=True)).all(dim=0).numpy()
        coordinates = ((self.transform(Image.fromarray(ramp))[:2].double() - black) / contrast.clamp(min=1e-9)).numpy()
        left, right = _edges(coordinates[0], inside)
        top, bottom = _edges(coordinates[1].T, inside.T)
        return left, top, right, bottom


def _edges(coordinates: NDArray[np.float64], inside: NDArray[np.bool_]) -> tuple[float, float]:
    """Extrapolate the coordinates of an output's columns to its left and right edges, by a fitted line."""
    counts = inside.sum(axis=0)
    across = np.where(inside, coordinates, 0).sum(axis=0) / np.maximum(counts, 1)
    # At the edges of the image, interpolation lacks neighbours and 8 bits saturate.
    usable = (counts > 0) & (across > 0.06) & (across < 0.94)
    if usable.sum() < 2:
        raise ValueError(
            "Expected a transform that resizes and crops, but its output does not show which part it uses."
        )
    places = (np.arange(len(across)) + 0.5) / len(across)
    slope, start = np.polyfit(places[usable], across[usable], 1)
    if slope <= 0:
        raise ValueError("Expected a transform that keeps images upright, but it flips them.")
    return float(start), float(start + slope)
