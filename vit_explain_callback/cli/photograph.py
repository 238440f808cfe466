"""Photographs: reading a file, the part of it that a model sees, and drawing maps back onto it."""

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
_LONGER_SIDE = (320, 640)  # pixels of the picture that is drawn on, at least and at most
_FAINT = 0.3  # contrast of what the model does not see
_OUTLINE = (140, 140, 140)
_RAMP_SIDE = 32


def image_files(folder: Path) -> list[Path]:
    """The files in a folder and in those below it that are named like images, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_image(path: Path) -> Image.Image:
    """Read any image as 8-bit RGB, the way up that its EXIF data say, on white where it is transparent.

    16-bit grey is scaled by its full range; floating-point grey by the range of the image.

    Raises:
        OSError: If there is no such file, or if it is not an image or a broken one.
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
    """A photograph as it is shown.

    Attributes:
        path: Its file.
        size: (width, height) of the file's image in pixels, the right way up.
        picture: The image, with a longer side of 320 to 640 pixels, (H, W, 3).
        box: What the model sees of it.
    """

    path: Path
    size: tuple[int, int]
    picture: Picture
    box: Box

    @classmethod
    def read(cls, path: Path, view: View) -> tuple[Photograph, Tensor]:
        """A photograph, and what the model is given of it, (C, H, W).

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
        """The model's part as (left, top, right, bottom) in pixels of the file's image, within it."""
        width, height = self.size
        pixels = (round(edge * length) for edge, length in zip(self.box, (width, height) * 2, strict=True))
        left, top, right, bottom = pixels
        return max(left, 0), max(top, 0), min(right, width), min(bottom, height)

    def overlay(self, relevance: Tensor, limit: float) -> Picture:
        """Lay a map (grid_h, grid_w) over the part that the model sees; the rest is faint, beyond a thin line.

        Args:
            relevance: The map.
            limit: Upper end of the colour scale, in multiples of uniform relevance.
        """
        height, width, _ = self.picture.shape
        faint = 1 - _FAINT * (1 - backdrop(self.picture))
        canvas = Image.fromarray((faint * 255).round().astype(np.uint8)).convert("RGB")
        left, top, right, bottom = (round(e * n) for e, n in zip(self.box, (width, height) * 2, strict=True))
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        # A model that pads sees more than the photograph: cropping adds what is missing, pasting takes it away again.
        part = Image.fromarray(self.picture).crop((left, top, right, bottom))
        canvas.paste(Image.fromarray(overlay(np.asarray(part), relevance, limit)), (left, top))
        # A bright photograph looks like what lies outside.
        ImageDraw.Draw(canvas).rectangle((left - 1, top - 1, right, bottom), outline=_OUTLINE)
        return np.asarray(canvas)


@dataclass(frozen=True)
class View:
    """How a model sees photographs: the transform that turns them into its input, undone.

    Attributes:
        transform: Resizes, crops or pads an RGB image, and normalises each channel: (C, H, W).
    """

    transform: Transform
    _boxes: dict[tuple[int, int], Box] = field(default_factory=dict, repr=False)

    def box(self, size: tuple[int, int]) -> Box:
        """The part of an image of `size` = (width, height) that the model sees, as (left, top, right, bottom).

        In fractions of width and height, below 0 or above 1 where the transform pads. Found by transforming an image
        whose colours are its coordinates.

        Raises:
            ValueError: If the transform does not keep the image upright and its colours apart.
        """
        # Where an image has only a few pixels, resizing blurs all of the coordinates: a larger one of the same shape.
        enlarged = -(-_RAMP_SIDE // min(size))
        width, height = size[0] * enlarged, size[1] * enlarged
        if size not in self._boxes:
            if len(self._boxes) >= 256:
                self._boxes.clear()
            self._boxes[size] = self._find_box(width, height)
        return self._boxes[size]

    @cached_property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel that the transform divides out."""
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
        # Padding is the same whatever the image.
        inside = (contrast > 0.99 * contrast.amax(dim=(1, 2), keepdim=True)).all(dim=0).numpy()
        coordinates = ((self.transform(Image.fromarray(ramp))[:2].double() - black) / contrast.clamp(min=1e-9)).numpy()
        left, right = _edges(coordinates[0], inside)
        top, bottom = _edges(coordinates[1].T, inside.T)
        return left, top, right, bottom


def _edges(coordinates: NDArray[np.float64], inside: NDArray[np.bool_]) -> tuple[float, float]:
    """Coordinates at the left and the right edge of an output: the line through those of its columns."""
    counts = inside.sum(axis=0)
    across = np.where(inside, coordinates, 0).sum(axis=0) / np.maximum(counts, 1)
    # At the ends of the image interpolation has no neighbours, and 8 bits no room beyond.
    usable = (counts > 0) & (across > 0.06) & (across < 0.94)
    if usable.sum() < 2:
        raise ValueError("Expected a transform that resizes and crops, but its output does not show where it looks.")
    places = (np.arange(len(across)) + 0.5) / len(across)
    slope, start = np.polyfit(places[usable], across[usable], 1)
    if slope <= 0:
        raise ValueError("Expected a transform that keeps images upright, but it turns them.")
    return float(start), float(start + slope)
