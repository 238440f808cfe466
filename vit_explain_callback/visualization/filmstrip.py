"""The filmstrip: how each image's map changed over training, in one picture.

TensorBoard shows a picture 350 pixels wide until it is clicked, and takes the nearest pixel: every second one of a
picture of 700, which is the width of a strip of an image and four maps, with no line thinner than two pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from vit_explain_callback.metrics.maps import is_degenerate
from vit_explain_callback.visualization.captions import DEGENERATE, step_headings
from vit_explain_callback.visualization.overlay import Picture, outlined, overlay, resized
from vit_explain_callback.visualization.text import PAPER, colour_bar, fitting, write

_CELL = 132  # wide
_GAP = 10
_WIDTH = 5 * _CELL + 4 * _GAP
_LARGE, _SMALL = 21, 15
_LINE = 25  # of large text
_CURVE = 50
_CURVE_COLOUR = (90, 26, 176)
_FAINT = (205, 205, 205)
_DASHED = (110, 110, 110)
_DASHES = {"noise": 3, "unrelated": 9}  # pixels


def filmstrip(
    pictures: Sequence[Picture],
    titles: Sequence[str],
    steps: Sequence[int],
    maps: Sequence[Tensor],
    captions: Sequence[Sequence[str]],
    correlations: Sequence[Sequence[float]],
    method: str,
    limit: float,
    noise: float = math.nan,
    unrelated: float = math.nan,
    masks: Sequence[Tensor] = (),
) -> Picture:
    """Draw a filmstrip: rows are images; columns are the image itself, the baseline, later snapshots, and now.

    Args:
        pictures: The shown images, all of one size (H, W, 3).
        titles: Text under each image, of one line or two.
        steps: Of the T columns of maps, baseline first.
        maps: Maps of each column, (B, grid_h, grid_w), those of the shown images first.
        captions: Text under each map, of one line or two: `captions[column][row]`.
        correlations: Rank correlation of each map with the baseline's, in [-1, 1], `correlations[column][row]`: the
            curve under each row, from 1 at its top to 0 and less at its bottom.
        method: Name of the method whose maps are drawn.
        limit: End of the colour scale, in multiples of uniform relevance.
        noise: Rank correlation under a change that should not matter; NaN if it is not known.
        unrelated: Rank correlation between different images; NaN if it is not known.
        masks: Regions whose contours are drawn, each (B, h, w) boolean.

    Returns:
        The picture, (height, width, 3).
    """
    strip = _Strip(pictures[0].shape, len(pictures), len(maps))
    levels = {name: value for name, value in (("noise", noise), ("unrelated", unrelated)) if math.isfinite(value)}
    for column, heading in enumerate(step_headings(steps), start=1):
        strip.heading(heading, column)
    for row, picture in enumerate(pictures):
        small = resized(picture, strip.cell_height, strip.cell_width)
        regions = [mask[row] for mask in masks]
        strip.cell(_with_contours(small, regions), titles[row], 0, row)
        for column, relevance in enumerate(maps, start=1):
            drawn = _with_contours(overlay(small, relevance[row], limit), regions)
            strip.cell(drawn, captions[column - 1][row], column, row)
            if is_degenerate(relevance[row][None]).item():
                strip.note(DEGENERATE, column, row)
        strip.curve([column[row] for column in correlations], levels, row)
    strip.legend(method, limit, any(bool((each < 0).any()) for each in maps), levels)
    return np.asarray(strip.canvas)


class _Strip:
    """The canvas of a filmstrip, and where everything stands on it."""

    def __init__(self, shape: Sequence[int], rows: int, columns: int) -> None:
        self.cell_width, self.cell_height = _CELL, max(1, round(_CELL * shape[0] / shape[1]))
        self._row_height = self.cell_height + 2 * _LINE + _CURVE + _GAP
        self._head = 2 * _LINE
        width = max(_WIDTH, (columns + 1) * (_CELL + _GAP) - _GAP)
        size = (width, self._head + rows * self._row_height + 2 * _LINE)
        self.canvas = Image.new("RGB", size, PAPER)
        self._pen = ImageDraw.Draw(self.canvas)

    def heading(self, text: str, column: int) -> None:
        """Write one line or two over a column."""
        lines = text.split("\n")
        for line, words in enumerate(lines, start=2 - len(lines)):
            self._large(words, (self._left(column), line * _LINE), self.cell_width)

    def cell(self, picture: Picture, text: str, column: int, row: int) -> None:
        """Paste a picture, with one line or two under it, the first one large."""
        left, top = self._left(column), self._top(row)
        self.canvas.paste(Image.fromarray(picture), (left, top))
        first, _, second = text.partition("\n")
        under = top + self.cell_height + 1
        self._large(first, (left, under), self.cell_width)
        write(self.canvas, second, (left, under + _LINE), self.cell_width, _SMALL)

    def note(self, text: str, column: int, row: int) -> None:
        """Write on a picture."""
        write(self.canvas, text, (self._left(column) + 2, self._top(row) + 4), self.cell_width - 2, _SMALL)

    def curve(self, values: Sequence[float], levels: Mapping[str, float], row: int) -> None:
        """Draw values against the columns with their scale, from 1 to 0 or less; what is not finite leaves a gap."""
        top = self._top(row) + self.cell_height + 2 * _LINE + 8
        bottom = top + _CURVE - 20
        xs = [self._left(column) + self.cell_width / 2 for column in range(1, len(values) + 1)]
        start, end = self._left(1), xs[-1] + self.cell_width / 2

        def height(value: float) -> float:
            return bottom - min(max(value, 0.0), 1.0) * (bottom - top)

        for value, text in ((1.0, "1"), (0.0, "0")):
            self._pen.line([(start, height(value)), (end, height(value))], fill=_FAINT, width=2)
            write(self.canvas, text, (start - 4, height(value)), _LARGE, _SMALL, "rm")
        write(self.canvas, "rank corr.", (0, (top + bottom) / 2), self.cell_width - _LARGE, _SMALL, "lm")
        for name, value in levels.items():
            self._dashed(start, end, height(value), _DASHES[name])
        places = [(x, height(value)) if math.isfinite(value) else None for x, value in zip(xs, values, strict=True)]
        for one, other in pairwise(places):
            if one and other:
                self._pen.line([one, other], fill=_CURVE_COLOUR, width=3)
        for x, y in filter(None, places):
            self._pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=_CURVE_COLOUR)

    def legend(self, method: str, limit: float, signed: bool, levels: Iterable[str]) -> None:
        """Write what is drawn: the method with its colours, and the lines of the curves."""
        y = self.canvas.height - 2 * _LINE + 4
        middle = self.canvas.width // 2
        self._large(method, (0, y), middle - _GAP)
        bar = colour_bar(limit, self.canvas.width - middle, signed, _SMALL)
        self.canvas.paste(Image.fromarray(bar), (middle, y))
        write(self.canvas, "● rank correlation with the baseline", (0, y + _LINE), middle, _SMALL)
        for place, name in enumerate(levels):
            x = middle * (1 + place / 2)
            self._dashed(x, x + 36, y + _LINE + 10, _DASHES[name])
            write(self.canvas, name, (x + 44, y + _LINE), middle / 2 - 44, _SMALL)

    def _large(self, text: str, place: tuple[float, float], width: float) -> None:
        """Write in large letters, or in small ones where only they leave the text whole."""
        write(self.canvas, text, place, width, _LARGE if fitting(text, width, _LARGE) == text else _SMALL)

    def _dashed(self, start: float, end: float, y: float, dash: int) -> None:
        for place in range(round(start), round(end), 2 * dash):
            self._pen.line([(place, y), (min(place + dash, end), y)], fill=_DASHED, width=2)

    def _left(self, column: int) -> int:
        return column * (self.cell_width + _GAP)

    def _top(self, row: int) -> int:
        return self._head + row * self._row_height


def _with_contours(picture: Picture, masks: Sequence[Tensor]) -> Picture:
    for mask in masks:
        picture = outlined(picture, mask)
    return picture
