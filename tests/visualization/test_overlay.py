"""Overlays, differences and contours: every pixel against a second implementation in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vit_explain_callback.visualization.overlay import (
    NEGATIVE,
    POSITIVE,
    Picture,
    colour_limit,
    difference,
    outlined,
    overlay,
    resized,
    times_uniform,
    unnormalise,
)

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def naive_overlay(picture: Picture, values: list[list[float]]) -> list[list[list[float]]]:
    """Pixel by pixel: grey 0.45 + 0.55 × luma, under the colour of the value in [-1, 1] of the patch it lies in."""
    height, width, _ = picture.shape
    pixels = []
    for y in range(height):
        row = []
        for x in range(width):
            red, green, blue = (int(channel) for channel in picture[y, x])
            grey = 0.45 + 0.55 * (0.299 * red + 0.587 * green + 0.114 * blue) / 255
            value = values[y * len(values) // height][x * len(values[0]) // width]
            table = NEGATIVE if value < 0 else POSITIVE
            *colour, opacity = table[round(min(abs(value), 1.0) * 255)]
            row.append([255 * (opacity * channel + (1 - opacity) * grey) for channel in colour])
        pixels.append(row)
    return pixels


def naive_multiples(relevance: torch.Tensor) -> list[list[float]]:
    mean = sum(abs(value) for row in relevance.tolist() for value in row) / relevance.numel()
    return [[value / mean for value in row] for row in relevance.tolist()]


@pytest.mark.parametrize("signed", [False, True])
def test_an_overlay_is_what_the_slow_way_draws(signed: bool) -> None:
    relevance = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    relevance -= 0.4 if signed else 0
    values = [[value / 1.5 for value in row] for row in naive_multiples(relevance)]
    shown = overlay(PHOTOGRAPH, relevance, limit=1.5)
    np.testing.assert_allclose(shown, naive_overlay(PHOTOGRAPH, values), atol=0.5 + 1e-9)
    assert (overlay(PHOTOGRAPH, relevance / 1000, limit=1.5) == shown).all()


def test_a_difference_is_what_the_slow_way_draws() -> None:
    after, before = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = [
        [(one - other) / 0.7 for one, other in zip(*rows, strict=True)]
        for rows in zip(naive_multiples(after), naive_multiples(before), strict=True)
    ]
    np.testing.assert_allclose(
        difference(PHOTOGRAPH, after, before, limit=0.7), naive_overlay(PHOTOGRAPH, values), atol=0.5 + 1e-9
    )


def test_a_degenerate_map_leaves_the_light_grey_picture() -> None:
    plain = naive_overlay(PHOTOGRAPH, [[0.0]])
    flat = torch.full((2, 3), 0.25)
    for nothing in (flat, flat * 0, flat * torch.nan, flat * torch.inf):
        np.testing.assert_allclose(overlay(PHOTOGRAPH, nothing, limit=1.0), plain, atol=0.5 + 1e-9)
        assert colour_limit(nothing[None]) == 2.0
    useful = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.1]])
    assert times_uniform(torch.stack([flat, useful])).isnan().any(dim=2).any(dim=1).tolist() == [True, False]


def test_the_colour_limit_is_robust_and_never_below_twice_uniform() -> None:
    even = torch.full((4, 10, 10), 0.01)
    even[:, 0, 0] = 0.012
    assert colour_limit(even) == 2.0
    spiked = even.clone()
    spiked[0, 5, 5] = 0.9
    assert colour_limit(spiked) < 3
    broad = even.clone()
    broad[:, 0] = 0.09
    assert colour_limit(broad) == pytest.approx(0.09 / 0.018)
    assert colour_limit(-broad + broad.amax()) == 2.0
    negative = torch.full((4, 10, 10), 0.01)
    negative[:, 0, :5] = -0.09
    assert colour_limit(negative) == pytest.approx(0.09 / 0.014)


def test_a_contour_runs_along_both_sides_of_the_edge_of_a_region() -> None:
    black = np.zeros((24, 36, 3), dtype=np.uint8)
    mask = torch.zeros(12, 18, dtype=torch.bool)
    mask[3:9, 6:12] = True
    shown = outlined(black, mask)
    inside = np.zeros((24, 36), dtype=bool)
    inside[6:18, 12:24] = True
    near = [(down, right) for down in range(-2, 3) for right in range(-2, 3) if abs(down) + abs(right) <= 2]
    for y in range(2, 22):
        for x in range(2, 34):
            edge = any(inside[y + down, x + right] != inside[y, x] for down, right in near)
            expected = [0, 0, 0] if not edge else [0, 120, 90] if inside[y, x] else [255] * 3
            assert shown[y, x].tolist() == expected, (y, x)
    assert (black == 0).all()
    assert (outlined(black, torch.zeros(12, 18, dtype=torch.bool)) == black).all()


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


def test_resizing_keeps_pixels_sharp() -> None:
    assert set(np.unique(resized(np.eye(3, dtype=np.uint8)[..., None].repeat(3, 2) * 255, 9, 9))) == {0, 255}
    assert resized(PHOTOGRAPH, 6, 9).shape == (6, 9, 3)


def test_the_opacity_grows_with_the_magnitude_and_lightness_falls() -> None:
    for table in (POSITIVE, NEGATIVE):
        assert table[0, 3] == 0
        assert (np.diff(table[:, 3]) > 0).all()
        assert (np.diff(table[:, :3] @ [0.2126, 0.7152, 0.0722]) < 0).all()
        assert math.isclose(table[255, 3], 0.9)
        # The strongest is darker than the darkest backdrop, 0.45, even where that shines through.
        assert 0.9 * table[255, :3].max() + 0.1 * 0.45 < 0.45 or table[255, :3] @ [0.2126, 0.7152, 0.0722] < 0.2
