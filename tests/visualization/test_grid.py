"""Grids of pictures: text as it is, cells in their places."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vit_explain_callback.visualization.encode import rendered
from vit_explain_callback.visualization.grid import Cell, draw_grid

PICTURES = [np.full((10, 15, 3), value, dtype=np.uint8) for value in (10, 90, 200)]


def test_pictures_stand_in_rows_and_columns() -> None:
    cells: list[list[Cell | None]] = [
        [Cell(PICTURES[0], "one"), None],
        [Cell(PICTURES[1]), Cell(PICTURES[2], "two\nlines")],
    ]
    grid = draw_grid(cells, ["left", "right\nside"], ["first", "second"], limit_meaning="end")
    assert len(grid.axes) == 4  # and the colour scale
    texts = [text.get_text() for text in grid.texts]
    assert {"one", "two\nlines", "left", "right\nside", "first", "second", "0", "end"} <= set(texts)
    places = [axes.get_position() for axes in grid.axes[:3]]
    assert places[0].x0 == places[1].x0 < places[2].x0
    assert places[0].y0 > places[1].y0 == places[2].y0
    picture = rendered(grid)
    for value in (10, 90, 200):
        assert (picture == value).all(axis=2).sum() > 20_000


def test_a_dollar_begins_no_formula() -> None:
    name = r"$\frac{1$"
    grid = draw_grid([[Cell(PICTURES[0], name)]], [name], [name], limit_meaning=name, signed=True)
    assert rendered(grid).shape[2] == 3


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("columns", [2, 7])
def test_no_text_lies_on_another_and_none_is_cut(signed: bool, columns: int) -> None:
    row: list[Cell | None] = [Cell(PICTURES[0], "target dog · p 0.50")] * columns
    grid = draw_grid([row], ["heading"] * columns, limit_meaning="the limit over each column", signed=signed)
    FigureCanvasAgg(grid).draw()
    boxes = [text.get_window_extent() for text in grid.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(grid.bbox.x0 <= box.x0 and box.x1 <= grid.bbox.x1 and box.y0 >= grid.bbox.y0 for box in boxes)
