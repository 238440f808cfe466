"""The heat map of blocks by steps: colours read back out of the picture."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest

from vit_explain_callback.visualization.heatmap import block_heatmap


def test_each_value_has_its_colour_first_block_at_the_bottom() -> None:
    values = [[1.0, 0.6, -0.5], [1.0, 0.3, math.nan]]
    picture = block_heatmap(values, [0, 10, 20])
    assert picture.shape == (520, 700, 3)
    rows = np.flatnonzero((picture[:, 150] == picture[200, 150]).all(axis=1))  # the first column is all 1
    top, bottom = rows.min(), rows.max()
    line = picture[top + 10]
    inner = np.flatnonzero((line != 255).any(axis=1) & (line != 0).any(axis=1))
    left = inner.min()
    width = np.flatnonzero((line[left:] == [0xD0] * 3).all(axis=1)).max() + 1  # the last column's grey ends the map
    for row, column_values in enumerate(values):
        for column, value in enumerate(column_values):
            y = bottom - round((row + 0.5) / 2 * (bottom - top))
            x = left + round((column + 0.5) / 3 * width)
            known = not math.isnan(value)
            colour = matplotlib.colormaps["magma"](max(value, 0.0), bytes=True)[:3] if known else (0xD0,) * 3
            assert np.abs(picture[y, x].astype(int) - np.array(colour, dtype=int)).max() <= 1, (row, column)


def test_one_step_many_blocks_and_long_runs_are_drawn() -> None:
    assert block_heatmap([[1.0]] * 24, [0]).shape == (520, 700, 3)
    assert block_heatmap(np.ones((3, 300)), list(range(300)), [10, 11, 12], title="$x").shape == (520, 700, 3)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\), for each block and step, but got \(1, 2\)"):
        block_heatmap([[1.0, 0.5]], [0, 1, 2])
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        block_heatmap([[1.0]], [0], [3, 4])
