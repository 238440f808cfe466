"""Text in pictures: lines cut to their width, a strip under a picture, the colour scale with its ends named."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_explain_callback.visualization.captions import limit_caption
from vit_explain_callback.visualization.overlay import Picture, blend

TEXT_SIZE = 12
STRIP_HEIGHT = 18
INK = (32, 32, 32)
PAPER = (255, 255, 255)
_BAR_LENGTH = 10  # in heights of the text


def write(
    canvas: Image.Image, text: str, place: tuple[float, float], width: float, size: int = TEXT_SIZE, anchor: str = "la"
) -> None:
    """Write one line; what is longer than `width` pixels loses its middle.

    Args:
        canvas: Picture to write on.
        text: The line.
        place: (x, y) of the anchor.
        width: Room for the line, in pixels.
        size: Of the letters, in pixels.
        anchor: The corner of the line that is at `place`, in Pillow's letters.
    """
    ImageDraw.Draw(canvas).text(place, fitting(text, width, size), fill=INK, font=_font(size), anchor=anchor)


def fitting(text: str, width: float, size: int = TEXT_SIZE) -> str:
    """The text, or as much of its start and its end as fits into `width` pixels, with an ellipsis between.

    The end is kept because captions end in a number, and file names in what tells them apart.
    """
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text) - 1  # characters kept: of those that fit, the most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(_elided(text, middle)) <= width else (low, middle - 1)
    return _elided(text, low)


def with_strip(picture: Picture, text: str) -> Picture:
    """The picture with a line of text under it, cut to its width."""
    height, width, _ = picture.shape
    canvas = Image.new("RGB", (width, height + STRIP_HEIGHT), PAPER)
    canvas.paste(Image.fromarray(picture), (0, 0))
    write(canvas, text, (3, height + STRIP_HEIGHT / 2), width - 6, anchor="lm")
    return np.asarray(canvas)


def colour_bar(limit: float, width: int, signed: bool = False, size: int = TEXT_SIZE) -> Picture:
    """The colours of relevance with their ends named, `width` × 1.5 `size` pixels: from 0, or −`limit`, to `limit`."""
    canvas = Image.new("RGB", (width, round(1.5 * size)), PAPER)
    font, middle = _font(size), canvas.height / 2
    low = f"−{limit:.3g}" if signed else "0"
    left = round(font.getlength(low) + size / 2)
    length = min(_BAR_LENGTH * size, max(1, width - 2 * left))
    bar = colour_ramp(length, size, signed)
    write(canvas, low, (2, middle), left, size, "lm")
    canvas.paste(Image.fromarray(bar), (left, round(middle - size / 2)))
    write(
        canvas, limit_caption(limit), (left + length + size / 3, middle), width - left - length - size / 2, size, "lm"
    )
    return np.asarray(canvas)


def colour_ramp(width: int, height: int, signed: bool = False) -> Picture:
    """The colours of relevance from 0, or from −1, to 1, as they look on a grey of middle lightness."""
    values = np.linspace(-1.0 if signed else 0.0, 1.0, width)[None].repeat(height, axis=0)
    return blend(np.full_like(values, 0.8), values)


def _elided(text: str, length: int) -> str:
    tail = length // 2
    return f"{text[: length - tail]}…{text[len(text) - tail :]}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib's own font: it is always there, and has Greek, Cyrillic and signs that Pillow's lacks.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
