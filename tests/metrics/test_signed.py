"""Maps of both signs: ranks take the sign, distributions the positive part; each against NumPy and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, centroid_shift, cosine, jensen_shannon, spearman
from vit_explain_callback.metrics.drift import top10_iou as iou
from vit_explain_callback.metrics.faithfulness import symmetric_relevance_gain
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.maps import is_degenerate
from vit_explain_callback.metrics.shape import map_statistics, sink_lift

RANKING = ("spearman", "top10_iou", "cosine")
DISTRIBUTION = ("jensen_shannon", "centroid_shift")


def signed_maps(count: int = 4, grid: tuple[int, int] = (6, 8), seed: int = 0) -> Tensor:
    """More patches below zero than above, so that a clamp would tie most of them."""
    return torch.randn(count, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def test_what_compares_maps_equals_numpy_and_scipy() -> None:
    one, other = signed_maps(seed=1), signed_maps(seed=2)
    other = one + 0.5 * other
    for image in range(4):
        p, q = one[image].flatten().numpy(), other[image].flatten().numpy()
        assert spearman(one, other)[image].item() == pytest.approx(stats.spearmanr(p, q).statistic, abs=1e-6)
        expected = (p @ q) / (np.linalg.norm(p) * np.linalg.norm(q))
        assert cosine(one, other)[image].item() == pytest.approx(expected, abs=1e-6)
        sets = [set(np.argsort(values)[-5:].tolist()) for values in (p, q)]
        assert iou(one, other)[image].item() == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        positive = [np.where(values > 0, values, 0) / values[values > 0].sum() for values in (p, q)]
        expected = jensenshannon(*positive) ** 2 / math.log(2)
        assert jensen_shannon(one, other)[image].item() == pytest.approx(expected, abs=1e-9)
        places = np.array([(row, column) for row in range(6) for column in range(8)])
        expected = np.linalg.norm(positive[0] @ places - positive[1] @ places) / math.hypot(5, 7)
        assert centroid_shift(one, other)[image].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_a_signed_map_has_not_drifted_from_itself_scaled(metric: str) -> None:
    maps = signed_maps()
    expected = torch.full((4,), METRICS[metric].unchanged, dtype=torch.float64)
    torch.testing.assert_close(METRICS[metric](maps, 1000 * maps), expected, atol=1e-6, rtol=0)


def test_a_map_and_its_negative_are_opposite() -> None:
    maps = signed_maps()
    for metric in (spearman, cosine):
        torch.testing.assert_close(metric(maps, -maps), -torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_what_needs_a_distribution_takes_the_positive_part() -> None:
    maps = signed_maps()
    found, of_positive = map_statistics(maps), map_statistics(maps.clamp(min=0))
    for name in found.keys() - {"patch_mass"}:
        assert found[name].equal(of_positive[name]), name
        assert found[name].isfinite().all(), name
    torch.testing.assert_close(found["patch_mass"], torch.tensor([m.numpy().sum() for m in maps]))
    received = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(3))
    assert sink_lift(maps, received).equal(sink_lift(maps.clamp(min=0), received))


def test_regions_equal_numpy() -> None:
    maps = signed_maps(seed=5)
    masks = torch.zeros(4, 12, 16, dtype=torch.bool)
    masks[:, 2:9, 4:12] = True
    found = region_statistics(maps, masks)
    covered = masks.numpy().reshape(4, 6, 2, 8, 2).mean(axis=(2, 4)).reshape(4, -1)
    for image in range(4):
        values, share = maps[image].numpy().flatten(), covered[image]
        positive = np.where(values > 0, values, 0)
        mass = (positive * share).sum() / positive.sum()
        assert found["mass"][image].item() == pytest.approx(mass)
        assert found["lift"][image].item() == pytest.approx(mass / share.mean())
        inside = share >= 0.5
        assert found["pointing_game"][image].item() == float(inside[values.argmax()])
        wins = (values[inside][:, None] > values[~inside][None]).mean()
        assert found["auroc"][image].item() == pytest.approx(wins, abs=1e-6)
        order = np.argsort(-values)
        precision = np.cumsum(inside[order]) / np.arange(1, len(order) + 1)
        assert found["average_precision"][image].item() == pytest.approx(precision[inside[order]].mean(), abs=1e-6)


def test_faithfulness_takes_away_what_speaks_against_first_among_the_least_relevant() -> None:
    maps = torch.tensor([[[-3.0, 0.0, -1.0, 2.0]]])
    taken: list[list[bool]] = []

    def remove(_images: Tensor, patches: Tensor) -> Tensor:
        taken.append(patches[0, 0].tolist())
        return torch.zeros(1, 2)

    symmetric_relevance_gain(remove, torch.zeros(1, 3, 4, 16), {"map": maps}, torch.tensor([0]), shares=(0.25, 0.5))
    assert taken == [
        [True, False, False, False],
        [False, False, False, True],
        [True, False, True, False],
        [False, True, False, True],
    ]


def test_without_a_positive_part_ranks_are_left() -> None:
    one, other = -1 - torch.rand(2, 3, 4), -1 - torch.rand(2, 3, 4)
    assert not is_degenerate(one).any()
    assert all(METRICS[name](one, other).isfinite().all() for name in RANKING)
    assert all(METRICS[name](one, other).isnan().all() for name in DISTRIBUTION)
    found = map_statistics(one)
    for name, values in found.items():
        assert values.isfinite().all() if name in ("patch_mass", "degenerate") else values.isnan().all(), name
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[:, 0] = True
    regions = region_statistics(one, masks)
    for name, values in regions.items():
        assert values.isnan().all() if name in ("mass", "lift") else values.isfinite().all(), name
    assert sink_lift(one, torch.rand(2, 3, 4)).isnan().all()


def test_a_flat_negative_map_is_degenerate() -> None:
    assert is_degenerate(torch.full((1, 3, 4), -0.2)).all()
    assert not is_degenerate(torch.tensor([[[-0.2, 0.2]]])).any()  # its sum is zero, and it ranks all the same
