"""Filmstrips: every cell, the curve with its scale, and its lines, read back out of the picture."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vit_explain_callback.visualization.filmstrip import filmstrip
from vit_explain_callback.visualization.overlay import Picture, outlined, overlay, resized
from vit_explain_callback.visualization.text import fitting

MODULE = sys.modules[filmstrip.__module__]  # the package has the function under the same name
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
MAPS = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) / 12
CELL_HEIGHT, CELL_WIDTH, GAP, LINE, CURVE = 88, 132, 10, 25, 50
ROW = CELL_HEIGHT + 2 * LINE + CURVE + GAP


def draw(correlations: list[list[float]], maps: list[Tensor] | None = None, **options: Any) -> Picture:
    maps = [MAPS, MAPS.flip(1)] if maps is None else maps
    captions = [["✗ cat\np(dog) 0.50"] * 3] * len(maps)
    steps = list(range(0, 9 * len(maps), 9))
    return filmstrip(
        [PICTURE] * 3,
        ["dog"] * 3,
        steps,
        maps,
        captions,
        correlations,
        "rollout",
        2.0,
        **options,  # type: ignore[arg-type]
    )


def cell(strip: Picture, row: int, column: int) -> Picture:
    top, left = 2 * LINE + row * ROW, column * (CELL_WIDTH + GAP)
    return strip[top : top + CELL_HEIGHT, left : left + CELL_WIDTH]


def test_it_has_a_row_for_each_image_and_a_column_for_each_snapshot() -> None:
    strip = draw([[1.0] * 3, [0.5] * 3])
    assert strip.shape == (4 * LINE + 3 * ROW, 700, 3)
    small = resized(PICTURE, CELL_HEIGHT, CELL_WIDTH)
    for row in range(3):
        assert (cell(strip, row, 0) == small).all()
        assert (cell(strip, row, 1) == overlay(small, MAPS[row], 2.0)).all()
        assert (cell(strip, row, 2) == overlay(small, MAPS[row].flip(0), 2.0)).all()


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_the_curve_runs_from_one_at_the_top_to_zero_and_less_at_the_bottom(unknown: float) -> None:
    strip = draw([[1.0] * 3, [0.5, -0.5, unknown]]).astype(int)
    x = 2 * (CELL_WIDTH + GAP) + CELL_WIDTH // 2  # the place of the second snapshot
    purple = (strip[..., 2] - strip[..., 1] > 100) & (strip[..., 0] < 150)
    for row, share in enumerate((0.5, 1.0, None)):
        top = 2 * LINE + row * ROW + CELL_HEIGHT + 2 * LINE + 8
        found = np.flatnonzero(purple[top - 6 : top + CURVE - 14, x])
        assert purple[top - 6 : top + CURVE - 14, x - 60].any() == (share is not None)  # or a gap
        assert (not len(found)) if share is None else abs(found.mean() - 6 - share * (CURVE - 20)) < 2


@pytest.mark.parametrize("levels", [{}, {"noise": 0.8}, {"noise": 0.8, "unrelated": 0.25}])
def test_noise_and_unrelated_lines_are_drawn_where_they_are_known(levels: dict[str, float]) -> None:
    strip = draw([[math.nan] * 3, [math.nan] * 3], None, **levels)
    dashes = (strip == 110).all(axis=2)
    for row in range(3):
        top = 2 * LINE + row * ROW + CELL_HEIGHT + 2 * LINE + 8
        drawn = np.flatnonzero(dashes[top : top + CURVE - 18, CELL_WIDTH + GAP :].any(axis=1))
        expected = sorted(round((1 - value) * (CURVE - 20)) for value in levels.values())
        assert len(drawn) == 2 * len(expected)  # two pixels thick
        assert all(min(abs(drawn - place)) <= 1 for place in expected)
    assert dashes[-LINE + 4 :, strip.shape[1] // 2 :].any() == bool(levels)  # and in the legend


def test_regions_are_outlined_in_every_cell() -> None:
    masks = torch.zeros(3, 12, 18, dtype=torch.bool)
    masks[:, 3:9, 6:12] = True
    strip = draw([[1.0] * 3, [0.5] * 3], masks=[masks])
    small = resized(PICTURE, CELL_HEIGHT, CELL_WIDTH)
    for row in range(3):
        assert (cell(strip, row, 0) == outlined(small, masks[row])).all()
        assert (cell(strip, row, 1) == outlined(overlay(small, MAPS[row], 2.0), masks[row])).all()


def test_a_degenerate_map_is_said_on_its_cell_only(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(MODULE, "write", lambda canvas, text, *rest: written.append(text))
    draw([[1.0] * 3, [math.nan] * 3], [MAPS, torch.stack([MAPS[0], MAPS[1] * 0, MAPS[2] * math.nan])])
    assert written.count("degenerate map") == 2


def test_what_stands_over_the_columns_and_under_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(MODULE, "write", lambda canvas, text, *rest: written.append(text))
    draw([[1.0] * 3] * 3, [MAPS] * 3)
    assert written[:5] == ["baseline", "step 0", "step 9", "now", "step 18"]
    assert written[5:9] == ["dog", "", "✗ cat", "p(dog) 0.50"]
    written.clear()
    draw([[1.0] * 3], [MAPS])
    assert written[:2] == ["baseline", "step 0"]


def test_letters_shrink_before_a_step_loses_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}

    def spy(canvas: Any, text: str, place: Any, width: float, size: int, *rest: Any) -> None:
        assert fitting(text, width, size) == text
        sizes[text] = size

    monkeypatch.setattr(MODULE, "write", spy)
    filmstrip([PICTURE], ["dog"], [0, 12345678], [MAPS] * 2, [["dog"]] * 2, [[1.0]] * 2, "rollout", 2.0)
    assert sizes["step 12345678"] < sizes["step 0"] == sizes["dog"]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_pictures_of_any_shape(shape: tuple[int, int]) -> None:
    picture = np.zeros((*shape, 3), dtype=np.uint8)
    strip = filmstrip([picture], [""], [0], [MAPS], [[""]], [[1.0]], "m", 2.0)
    assert strip.ndim == 3
