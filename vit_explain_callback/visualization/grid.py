"""A grid of pictures: rows and columns under headings, with the colour scale of the maps, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_explain_callback.visualization.overlay import Picture
from vit_explain_callback.visualization.text import colour_ramp

# Inches.
_WIDTH = 2.0
_LINE = 0.2
_LETTER = 0.075
_MARGIN = 0.08
_BAR = (2.0, 0.1)


@dataclass(frozen=True)
class Cell:
    """A picture of a grid.

    Attributes:
        picture: (H, W, 3).
        caption: Text under it.
    """

    picture: Picture
    caption: str = ""


def draw_grid(
    cells: Sequence[Sequence[Cell | None]],
    headings: Sequence[str],
    labels: Sequence[str] = (),
    limit_meaning: str = "",
    signed: bool = False,
) -> Figure:
    """Draw a grid of pictures of one shape; pyplot and a display are not needed.

    Args:
        cells: `cells[row][column]`; None leaves a place empty.
        headings: Text over each column, of one line or more.
        labels: Text to the left of each row; none for no such text.
        limit_meaning: Meaning of the upper end of the colour scale, as in "the limit over each column".
        signed: Whether the colour scale goes below 0.

    Returns:
        The figure, for `savefig`.
    """
    height, width, _ = next(cell.picture.shape for row in cells for cell in row if cell is not None)
    tall = _WIDTH * height / width
    row_height = tall + _LINE * max(_lines(cell.caption) for row in cells for cell in row if cell) + _MARGIN
    left = 0.5 * _LINE + _LETTER * max(len(line) for text in labels for line in text.split("\n")) if labels else 0.0
    top = _LINE * max(_lines(text) for text in headings) + _MARGIN
    size = (left + len(headings) * (_WIDTH + _MARGIN), top + len(cells) * row_height + 2.4 * _LINE)
    canvas = _Canvas(Figure(figsize=size, dpi=110), size)
    for column, text in enumerate(headings):
        middle = left + column * (_WIDTH + _MARGIN) + _WIDTH / 2
        canvas.write(middle, top - _MARGIN / 2, text, ha="center", va="bottom")
    for row, line in enumerate(cells):
        y = top + row * row_height
        if labels:
            canvas.write(left - _LINE / 2, y + tall / 2, labels[row], ha="right", va="center")
        for column, cell in enumerate(line):
            if cell is not None:
                x = left + column * (_WIDTH + _MARGIN)
                canvas.axes(x, y, _WIDTH, tall).imshow(cell.picture, aspect="auto")
                canvas.write(x + _WIDTH / 2, y + tall + _MARGIN / 2, cell.caption, ha="center", va="top")
    _colour_scale(canvas, left + _MARGIN, limit_meaning, signed)
    return canvas.draw_grid


@dataclass(frozen=True)
class _Canvas:
    """A figure addressed in inches from its top left corner."""

    draw_grid: Figure
    size: tuple[float, float]

    def write(self, x: float, y: float, text: str, **how: Any) -> None:
        """Write text as it is: a dollar in a name begins no formula."""
        width, height = self.size
        self.draw_grid.text(x / width, 1 - y / height, text, fontsize=8.5, parse_math=False, **how)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without frame and ticks."""
        across, down = self.size
        axes = self.draw_grid.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))
        axes.set_axis_off()
        return axes


def _colour_scale(canvas: _Canvas, left: float, text: str, signed: bool) -> None:
    width, height = canvas.size
    length, thick = min(_BAR[0], width / 3), _BAR[1]
    y = height - 1.3 * _LINE - thick
    canvas.axes(left, y, length, thick).imshow(colour_ramp(256, 1, signed), aspect="auto")
    under = y + thick + 0.02
    canvas.write(left, under, "−" if signed else "0", ha="left", va="top")
    if signed:
        canvas.write(left + length, under, "+", ha="right", va="top")
        canvas.write(left + length + _MARGIN, y + thick / 2, f"± {text}", ha="left", va="center")
    else:
        canvas.write(left + length, under, text, ha="right" if len(text) < 24 else "center", va="top")


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0
