"""Known answers for every measure, and what degenerate maps give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, centroid_shift, jensen_shannon, spearman, top10_iou
from vit_explain_callback.metrics.maps import is_degenerate
from vit_explain_callback.metrics.shape import map_statistics


def random_maps(count: int = 4, grid: tuple[int, int] = (6, 8), seed: int = 0) -> Tensor:
    return torch.rand(count, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blob(row: int, column: int, grid: tuple[int, int] = (10, 10)) -> Tensor:
    maps = torch.full((1, *grid), 1e-3, dtype=torch.float64)
    maps[0, row : row + 2, column : column + 2] = 1.0
    return maps


@pytest.mark.parametrize("metric", METRICS)
def test_a_map_has_not_drifted_from_itself_or_from_itself_scaled(metric: str) -> None:
    maps = random_maps()
    for other in (maps, maps.clone(), maps * 1000, maps.float()):
        expected = torch.full((4,), METRICS[metric].unchanged, dtype=torch.float64)
        torch.testing.assert_close(METRICS[metric](maps, other), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_measures_are_symmetric_and_taken_image_by_image(metric: str) -> None:
    one, other = random_maps(seed=1), random_maps(seed=2)
    together = METRICS[metric](one, other)
    torch.testing.assert_close(together, METRICS[metric](other, one))
    alone = torch.cat([METRICS[metric](one[i : i + 1], other[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)


def test_spearman_and_jensen_shannon_equal_scipy() -> None:
    one, other = random_maps(seed=1), random_maps(seed=2)
    other[0] = other[0].round(decimals=1)  # ties
    for image in range(4):
        p, q = one[image].flatten().numpy(), other[image].flatten().numpy()
        assert spearman(one, other)[image].item() == pytest.approx(stats.spearmanr(p, q).statistic, abs=1e-6)
        expected = jensenshannon(p, q) ** 2 / math.log(2)  # scipy returns the square root
        assert jensen_shannon(one, other)[image].item() == pytest.approx(expected, abs=1e-9)


def test_spearman_sees_only_the_ranking() -> None:
    maps = random_maps()
    torch.testing.assert_close(spearman(maps, maps.exp() ** 3), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(spearman(maps, 1 - maps), -torch.ones(4, dtype=torch.float64))


def test_jensen_shannon_of_disjoint_maps_is_one() -> None:
    left, right = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    left[..., 0], right[..., 3] = 1, 1
    assert jensen_shannon(left, right).item() == pytest.approx(1)


@pytest.mark.parametrize("shift", range(0, 9))
def test_a_blob_shifted_by_k_patches_moves_its_centroid_by_k(shift: int) -> None:
    sharp = blob(4, 0).where(blob(4, 0) > 0.5, 0)
    moved = sharp.roll(shift, dims=2) if shift < 9 else sharp
    assert centroid_shift(sharp, moved).item() == pytest.approx(shift / math.hypot(9, 9))


@pytest.mark.parametrize(("shift", "expected"), [(0, 4 / 4), (1, 2 / 6), (2, 0 / 8)])
def test_top_iou_counts_shared_patches(shift: int, expected: float) -> None:
    maps = torch.zeros(1, 5, 8, dtype=torch.float64)  # the strongest tenth are 4 of 40 patches
    maps[0, 1:3, 1:3] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    assert top10_iou(maps, maps.roll(shift, dims=2)).item() == pytest.approx(expected)


def test_more_noise_is_more_drift_in_every_measure() -> None:
    maps, noise = random_maps(64, seed=1) ** 4, random_maps(64, seed=2)
    for metric, measure in METRICS.items():
        values = [measure(maps, (1 - share) * maps + share * noise).mean().item() for share in (0.0, 0.3, 0.6, 0.9)]
        ordered = sorted(values, reverse=METRICS[metric].unchanged == 1)
        assert values == ordered, metric
        assert len(set(values)) == 4, metric


DEGENERATE = {
    "zero": torch.zeros(1, 3, 4),
    "constant": torch.full((1, 3, 4), 0.3),
    "nearly constant": torch.full((1, 3, 4), 0.3).index_fill(2, torch.tensor([1]), 0.3 + 1e-8),
    "NaN": random_maps(1, (3, 4)).index_fill(1, torch.tensor([0]), math.nan),
    "Inf": random_maps(1, (3, 4)).index_fill(1, torch.tensor([0]), math.inf),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_maps_give_nan_and_are_counted(kind: str) -> None:
    fine = random_maps(1, (3, 4))
    maps = torch.cat([fine, DEGENERATE[kind].double()])
    reference = torch.cat([fine, fine])
    assert is_degenerate(maps).tolist() == [False, True]
    for metric, measure in METRICS.items():
        for values in (measure(maps, reference), measure(reference, maps), measure(maps, maps)):
            assert values[0].item() == pytest.approx(METRICS[metric].unchanged, abs=1e-6)
            assert values[1].isnan()
    statistics = map_statistics(maps)
    assert statistics["degenerate"].tolist() == [0, 1]
    assert statistics["entropy"][1].isnan()
    assert statistics["top10_mass"][1].isnan()


def test_one_patch_alone_is_degenerate() -> None:
    assert is_degenerate(torch.ones(2, 1, 1)).all()
    assert all(measure(torch.ones(2, 1, 1), torch.ones(2, 1, 1)).isnan().all() for measure in METRICS.values())


def test_one_hot_maps_have_defined_values() -> None:
    one_hot = torch.zeros(1, 64, 64)
    one_hot[0, 5, 6] = 1
    for metric, measure in METRICS.items():
        assert measure(one_hot, one_hot).item() == pytest.approx(METRICS[metric].unchanged, abs=1e-6)
    statistics = map_statistics(one_hot)
    assert statistics["entropy"].item() == pytest.approx(0)
    assert statistics["top10_mass"].item() == pytest.approx(1)


def test_statistics_by_hand() -> None:
    maps = torch.tensor([[[1.0, 1.0], [2.0, 4.0]]], dtype=torch.float64)
    p = np.array([1, 1, 2, 4]) / 8
    assert map_statistics(maps)["entropy"].item() == pytest.approx(-(p * np.log(p)).sum() / np.log(4))
    assert map_statistics(maps)["top10_mass"].item() == pytest.approx(0.5)
    assert map_statistics(maps / 16)["patch_mass"].item() == pytest.approx(0.5)


def test_shapes_that_do_not_match_are_refused() -> None:
    for maps, reference in ((random_maps(2), random_maps(3)), (random_maps(2)[0], random_maps(2)[0])):
        with pytest.raises(ValueError, match=r"of one shape \(B, grid_h, grid_w\)"):
            spearman(maps, reference)
