"""Overlays, differences and filmstrips: sizes, colours and text, pixel by pixel where it can be told."""

from __future__ import annotations

import io
import math

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from vit_explain_callback.visualization.encode import png
from vit_explain_callback.visualization.filmstrip import filmstrip
from vit_explain_callback.visualization.overlay import (
    STRIP_HEIGHT,
    colour_bar,
    colour_limit,
    difference,
    overlay,
    resized,
    unnormalise,
    with_strip,
)

BLACK = np.zeros((24, 36, 3), dtype=np.uint8)


def colour(name: str, value: float) -> np.ndarray:
    return np.round(np.array(matplotlib.colormaps[name](value)[:3]) * 255)


def test_unnormalise_undoes_normalisation() -> None:
    pixels = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    image = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(unnormalise(image, mean, std), pixels.permute(1, 2, 0).numpy())
    grey = unnormalise(torch.zeros(1, 2, 2), (0.5,), (0.5,))
    assert grey.shape == (2, 2, 3)
    assert (grey == 128).all()
    with pytest.raises(ValueError, match="one value for each image channel"):
        unnormalise(image, (0.5,), (0.5,))


def test_an_overlay_shows_each_patch_in_one_flat_colour_of_the_shared_scale() -> None:
    relevance = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 20.0]])  # of the mean, 5: 0, 0.2, 0.4, …
    shown = overlay(BLACK, relevance, limit=2.0, alpha=1.0)
    assert (overlay(BLACK, relevance / 1000, limit=2.0, alpha=1.0) == shown).all()
    for row in range(2):
        for column in range(3):
            cell = shown[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12].reshape(-1, 3)
            assert (cell == cell[0]).all()
            value = min(1.0, relevance[row, column].item() / 5 / 2)
            assert np.abs(cell[0] - colour("inferno", value)).max() <= 1


def test_the_picture_shines_through_in_grey() -> None:
    picture = np.full((8, 8, 3), (200, 100, 0), dtype=np.uint8)
    shown = overlay(picture, torch.ones(2, 2), limit=1.0, alpha=0.0)
    assert (shown[..., 0] == shown[..., 1]).all()
    assert np.abs(shown[0, 0, 0].astype(int) - (0.299 * 200 + 0.587 * 100)) <= 1
    for nothing in (torch.nan, torch.inf, 0.0):
        assert (overlay(picture, torch.full((2, 2), nothing), limit=1.0) == shown).all()


def test_a_difference_is_white_where_nothing_changed_red_where_gained_and_blue_where_lost() -> None:
    before = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    after = torch.tensor([[0.2, 0.4], [0.0, 0.2]])
    shown = difference(BLACK, after, before, limit=2.0, alpha=1.0).astype(int)
    assert np.abs(shown[0, 0] - colour("RdBu_r", 0.5)).max() <= 1
    assert shown[0, -1, 0] > shown[0, -1, 2]
    assert shown[-1, 0, 2] > shown[-1, 0, 0]


def test_the_colour_limit_is_robust_and_never_below_twice_uniform() -> None:
    flat = torch.full((4, 10, 10), 0.01)
    assert colour_limit(flat) == 2.0
    spiked = flat.clone()
    spiked[0, 0, 0] = 0.05
    assert colour_limit(spiked) == 2.0
    assert colour_limit(torch.zeros(1, 2, 2)) == 2.0
    broad = flat.clone()
    broad[:, 0] = 0.09
    assert colour_limit(broad) == pytest.approx(0.09 / 0.018)
    assert colour_limit(torch.full((1, 2, 2), torch.nan)) == 2.0


def test_the_strip_of_text_is_added_below_and_cut_to_the_width() -> None:
    short, long = with_strip(BLACK, "ab"), with_strip(BLACK, "ab" * 50)
    assert short.shape == long.shape == (24 + STRIP_HEIGHT, 36, 3)
    assert (short[:24] == 0).all()
    assert (short[24:] < 128).any()
    assert (long[24:, -1] > 200).all()


def test_resizing_keeps_pixels_sharp() -> None:
    assert set(np.unique(resized(np.eye(3, dtype=np.uint8)[..., None].repeat(3, 2) * 255, 9, 9))) == {0, 255}
    assert resized(BLACK, 6, 9).shape == (6, 9, 3)
    assert colour_bar(3.21, 400).shape == (STRIP_HEIGHT, 400, 3)


def test_a_filmstrip_has_a_row_for_each_image_and_a_column_for_each_snapshot() -> None:
    maps = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) / 12
    captions = [["cat · p=0.50"] * 3] * 2
    drift = [[1.0, 1.0, 1.0], [0.5, -0.5, math.nan]]
    strip = filmstrip([BLACK] * 3, ["target cat"] * 3, [0, 9], [maps, maps.flip(1)], captions, drift, 2.0)
    cell_height, cell_width, gap, curve = 85, 128, 4, 24
    row_height = cell_height + STRIP_HEIGHT + curve + gap
    assert strip.shape == (2 * STRIP_HEIGHT + 3 * row_height, 3 * cell_width + 2 * gap, 3)
    for row in range(3):
        top = STRIP_HEIGHT + row * row_height
        lefts = (0, cell_width + gap, 2 * (cell_width + gap))
        image, baseline, now = (strip[top : top + cell_height, left : left + cell_width] for left in lefts)
        assert (image == 0).all()
        small = resized(BLACK, cell_height, cell_width)
        assert (baseline == overlay(small, maps[row], 2.0)).all()
        assert (now == overlay(small, maps[row].flip(0), 2.0)).all()
        assert not (baseline == now).all()
        bottom = top + row_height - gap
        now_end = strip[bottom - curve : bottom, -cell_width // 2 - 1].astype(int)  # the curve's colour is red
        red = np.flatnonzero(now_end[:, 0] - now_end[:, 1] > 100)
        heights = {0: (curve - 8) / 2 + 3, 1: curve - 5}  # half-way down; at the bottom
        assert (abs(red.mean() - heights[row]) < 2) if row in heights else not len(red)


def test_a_png_file_holds_every_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture)
