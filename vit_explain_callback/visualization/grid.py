"""Figures: pictures in rows and columns under headings, with the colour scale of the maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_explain_callback.visualization.overlay import MAP_COLOURS, Picture

_LINE = 0.2  # inches that a line of text takes
_MARGIN = 0.08


@dataclass(frozen=True)
class Cell:
    """A picture of a figure.

    Attributes:
        picture: (H, W, 3).
        caption: Text under it.
    """

    picture: Picture
    caption: str = ""


def figure(
    cells: Sequence[Sequence[Cell | None]],
    headings: Sequence[str],
    labels: Sequence[str] | None = None,
    scale: str = "",
    width: float = 2.0,
) -> Figure:
    """Draw a figure; pyplot and a display are not needed.

    Args:
        cells: `cells[row][column]`; None leaves a place empty.
        headings: Text over each column, of one line or more.
        labels: Text to the left of each row, or None.
        scale: What the upper end of the colour bar stands for, as in "the limit over each column".
        width: Of a column in inches.

    Returns:
        The figure, for `savefig`.
    """
    height, across, _ = next(cell.picture.shape for row in cells for cell in row if cell is not None)
    tall = width * height / across
    captions = max((cell.caption.count("\n") + 1 for row in cells for cell in row if cell and cell.caption), default=0)
    row_height = tall + captions * _LINE + _MARGIN
    left = (
        0.0 if labels is None else 0.5 * _LINE + 0.075 * max(len(line) for text in labels for line in text.split("\n"))
    )
    top = _LINE * (1 + max(text.count("\n") for text in headings)) + _MARGIN
    bottom = 2.4 * _LINE
    total_width = left + len(headings) * (width + _MARGIN)
    total_height = top + len(cells) * row_height + bottom
    drawn = Figure(figsize=(total_width, total_height), dpi=110)

    def write(x: float, y: float, text: str, **how: Any) -> None:
        drawn.text(
            x / total_width, 1 - y / total_height, text, fontsize=8.5, parse_math=False, **how
        )  # class names may hold $

    for column, text in enumerate(headings):
        write(left + column * (width + _MARGIN) + width / 2, top - _MARGIN / 2, text, ha="center", va="bottom")
    for row, line in enumerate(cells):
        y = top + row * row_height
        if labels is not None:
            write(left - _LINE / 2, y + tall / 2, labels[row], ha="right", va="center")
        for column, cell in enumerate(line):
            if cell is None:
                continue
            x = left + column * (width + _MARGIN)
            place = (x / total_width, 1 - (y + tall) / total_height, width / total_width, tall / total_height)
            axes = drawn.add_axes(place)
            axes.imshow(cell.picture, aspect="auto")
            axes.set_axis_off()
            write(x + width / 2, y + tall + _MARGIN / 2, cell.caption, ha="center", va="top")
    length = min(2.0, total_width / 3)
    bar = drawn.add_axes(
        (left / total_width + 0.01, 1.3 * _LINE / total_height, length / total_width, 0.1 / total_height)
    )
    bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=matplotlib.colormaps[MAP_COLOURS])
    bar.set_axis_off()
    under = total_height - 1.3 * _LINE + 0.02
    write(left + 0.01 * total_width, under, "0", ha="left", va="top")
    write(left + 0.01 * total_width + length, under, scale, ha="right" if len(scale) < 24 else "center", va="top")
    return drawn


def png(drawn: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    drawn.savefig(file, format="png")
    return file.getvalue()
