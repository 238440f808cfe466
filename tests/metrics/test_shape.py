"""Known answers for the shape of a map, and for its share on attention sinks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vit_explain_callback.metrics.shape import map_statistics, sink_lift

NAMES = ("entropy", "effective_patches", "gini", "top10_mass", "outer_ring_mass", "centroid_x", "centroid_y")


def on_patches(*places: tuple[int, int], grid: tuple[int, int] = (5, 9)) -> Tensor:
    maps = torch.zeros(1, *grid, dtype=torch.float64)
    for row, column in places:
        maps[0, row, column] = 0.1
    return maps


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_a_map_that_is_uniform_on_k_patches_has_k_effective_patches(count: int) -> None:
    maps = torch.zeros(1, 45)
    maps[:, :count] = 0.3
    found = map_statistics(maps.view(1, 5, 9))
    assert found["effective_patches"].item() == pytest.approx(count)
    assert found["entropy"].item() == pytest.approx(math.log(count) / math.log(45))
    assert found["gini"].item() == pytest.approx(1 - count / 45)


def test_the_gini_coefficient_is_half_the_mean_difference() -> None:
    maps = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index, values in enumerate(maps.flatten(1).numpy()):
        expected = np.abs(values[:, None] - values[None]).mean() / (2 * values.mean())
        assert map_statistics(maps)["gini"][index].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("places", "x", "y", "ring"),
    [
        ([(0, 0)], 0, 0, 1),
        ([(4, 8)], 1, 1, 1),
        ([(2, 4)], 0.5, 0.5, 0),
        ([(0, 8), (2, 4)], 0.75, 0.25, 0.5),
        ([(1, 1), (3, 7), (2, 0), (2, 8)], 0.5, 0.5, 0.5),
    ],
)
def test_where_a_map_lies(places: list[tuple[int, int]], x: float, y: float, ring: float) -> None:
    found = map_statistics(on_patches(*places))
    assert found["centroid_x"].item() == pytest.approx(x)
    assert found["centroid_y"].item() == pytest.approx(y)
    assert found["outer_ring_mass"].item() == pytest.approx(ring)


def test_a_single_row_has_a_centroid() -> None:
    found = map_statistics(torch.tensor([[[0.0, 1.0, 3.0]]]))
    assert found["centroid_x"].item() == pytest.approx(0.875)
    assert found["centroid_y"].item() == 0


@pytest.mark.parametrize("maps", [torch.zeros(1, 3, 4), torch.full((1, 3, 4), 0.2), torch.full((1, 3, 4), math.nan)])
def test_degenerate_maps_have_no_shape(maps: Tensor) -> None:
    found = map_statistics(maps)
    assert all(found[name].isnan().all() for name in NAMES)
    assert found["degenerate"].item() == 1
    assert sink_lift(maps, torch.rand(1, 3, 4)).isnan().all()


def test_sinks_are_the_hundredth_of_the_patches_that_receive_most() -> None:
    received = torch.ones(2, 20, 20)
    received[0, 0, :4] = 30
    received[1, 19, :4] = 30
    maps = torch.full((2, 20, 20), 0.001)
    maps[:, 0, :4] = 0.2
    both = (4 * 0.2 + 396 * 0.001, 4 * 0.2, 4 * 0.001)
    assert sink_lift(maps, received).tolist() == pytest.approx([100 * both[1] / both[0], 100 * both[2] / both[0]])
