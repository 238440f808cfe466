"""The filmstrip: how each image's map changed over training, in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from vit_explain_callback.visualization.overlay import STRIP_HEIGHT, Picture, colour_bar, overlay, resized, write

_CELL = 128
_GAP = 4
_CURVE = 24  # height of the curve under a row
_CURVE_COLOUR = (179, 40, 70)
_FAINT = (216, 216, 216)


def filmstrip(
    pictures: Sequence[Picture],
    titles: Sequence[str],
    steps: Sequence[int],
    maps: Sequence[Tensor],
    captions: Sequence[Sequence[str]],
    correlations: Sequence[Sequence[float]],
    limit: float,
) -> Picture:
    """Draw a filmstrip: rows are images; columns are the image itself, the baseline, later snapshots, and now.

    Args:
        pictures: The shown images, all of one size (H, W, 3).
        titles: A line under each image.
        steps: Of each column of maps, the baseline's first.
        maps: Of each column, (B, grid_h, grid_w), beginning with those of the shown images.
        captions: A line under each map: `captions[column][row]`.
        correlations: Of each map with the baseline's, in [-1, 1], `correlations[column][row]`: the curve under each
            row, from 1 at its top to 0 and less at its bottom.
        limit: Upper end of the colour scale, in multiples of uniform relevance.

    Returns:
        The picture, (height, width, 3).
    """
    height, width, _ = pictures[0].shape
    cell_height, cell_width = (max(1, round(side * _CELL / max(height, width))) for side in (height, width))
    row_height = cell_height + STRIP_HEIGHT + _CURVE
    columns = 1 + len(maps)
    size = (columns * (cell_width + _GAP) - _GAP, STRIP_HEIGHT * 2 + len(pictures) * (row_height + _GAP))
    canvas = Image.new("RGB", size, (255, 255, 255))

    def paste(cell: Picture, text: str, column: int, row: int) -> None:
        x, y = column * (cell_width + _GAP), STRIP_HEIGHT + row * (row_height + _GAP)
        canvas.paste(Image.fromarray(cell), (x, y))
        write(canvas, text, (x + 2, y + cell_height + 1), cell_width - 2)

    for column, heading in enumerate(_headings(steps)):
        write(canvas, heading, (column * (cell_width + _GAP) + 2, 1), cell_width - 2)
    for row, picture in enumerate(pictures):
        small = resized(picture, cell_height, cell_width)
        paste(small, titles[row], 0, row)
        for column, maps_then in enumerate(maps):
            paste(overlay(small, maps_then[row], limit), captions[column][row], column + 1, row)
        bottom = STRIP_HEIGHT + (row + 1) * (row_height + _GAP) - _GAP
        write(canvas, "rank correlation", (2, bottom - _CURVE), cell_width - 2)
        centres = [(column + 1.5) * (cell_width + _GAP) for column in range(len(maps))]
        _curve(canvas, centres, [column[row] for column in correlations], bottom - _CURVE + 3, bottom - 5)
    canvas.paste(Image.fromarray(colour_bar(limit, size[0])), (0, size[1] - STRIP_HEIGHT))
    return np.asarray(canvas)


def _curve(canvas: Image.Image, xs: Sequence[float], values: Sequence[float], top: int, bottom: int) -> None:
    """Draw values against x, with 1 at `top` and 0 or less at `bottom`; what is not finite leaves a gap."""
    pen = ImageDraw.Draw(canvas)
    pen.line([(xs[0], top), (xs[-1], top)], fill=_FAINT)
    pen.line([(xs[0], bottom), (xs[-1], bottom)], fill=_FAINT)
    places = [
        (x, bottom - min(max(value, 0.0), 1.0) * (bottom - top)) if math.isfinite(value) else None
        for x, value in zip(xs, values, strict=True)
    ]
    for start, end in pairwise(places):
        if start and end:
            pen.line([start, end], fill=_CURVE_COLOUR, width=2)
    for place in filter(None, places):
        pen.ellipse([place[0] - 2, place[1] - 2, place[0] + 2, place[1] + 2], fill=_CURVE_COLOUR)


def _headings(steps: Sequence[int]) -> list[str]:
    names = [f"step {step}" for step in steps]
    names[-1] += " (now)"
    names[0] = f"baseline ({names[0]})" if len(steps) > 1 else names[0]
    return ["image", *names]
