"""Noise floor and unrelated level by hand, and drift over batches and processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, MapDrift
from vit_explain_callback.metrics.reference import noise_floor, on_scale, unrelated_level


def random_maps(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("metric", METRICS)
def test_without_noise_and_without_change_the_bars_are_where_they_should_be(metric: str) -> None:
    maps = random_maps(6)
    measure = METRICS[metric]
    assert noise_floor(maps, maps, measure) == pytest.approx(METRICS[metric].unchanged, abs=1e-6)
    pairs = [(i, (i + shift) % 6) for shift in (1, 3) for i in range(6)]
    expected = [measure(maps[i : i + 1], maps[j : j + 1]).item() for i, j in pairs]
    assert unrelated_level(maps, measure) == pytest.approx(sum(expected) / len(expected))
    assert unrelated_level(maps[:1].repeat(4, 1, 1), measure) == pytest.approx(METRICS[metric].unchanged, abs=1e-6)
    assert math.isnan(unrelated_level(maps[:1], measure))


@pytest.mark.parametrize("count", [2, 3])
def test_two_and_three_images_are_compared_with_one_another(count: int) -> None:
    maps = random_maps(count)
    measure = METRICS["cosine"]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    expected = sum(measure(maps[i : i + 1], maps[j : j + 1]).item() for i, j in pairs) / len(pairs)
    assert unrelated_level(maps, measure) == pytest.approx(expected)


def test_degenerate_maps_do_not_count() -> None:
    maps = random_maps(4)
    broken = maps.clone()
    broken[2] = 0
    measure = METRICS["spearman"]
    assert noise_floor(maps, broken, measure) == pytest.approx(1)
    assert math.isfinite(unrelated_level(broken, measure))


@pytest.mark.parametrize(
    ("drift", "noise", "unrelated", "unchanged", "expected"),
    [
        (0.9, 0.9, 0.3, 1.0, 0.0),
        (0.3, 0.9, 0.3, 1.0, 1.0),
        (0.6, 0.9, 0.3, 1.0, 0.5),
        (1.0, 0.9, 0.4, 1.0, -0.2),
        (0.2, 0.1, 0.3, 0.0, 0.5),
        (0.5, 0.5, 0.4, 1.0, math.nan),  # a mirror matters nearly as much as another image
        (0.2, 0.3, 0.1, 0.0, math.nan),
        (math.nan, 0.9, 0.3, 1.0, math.nan),
        (0.5, math.nan, 0.3, 1.0, math.nan),
    ],
)
def test_drift_on_its_scale(drift: float, noise: float, unrelated: float, unchanged: float, expected: float) -> None:
    assert on_scale(drift, noise, unrelated, unchanged) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("measure", METRICS)
def test_the_metric_over_batches_is_that_of_all_images_at_once(measure: str) -> None:
    maps, reference = random_maps(7), random_maps(7, seed=1)
    maps[3] = 0
    drift = MapDrift(measure)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        drift.update(maps[part], reference[part])
    assert drift.compute().item() == pytest.approx(METRICS[measure](maps, reference).nanmean().item())
    assert (drift.count.item(), drift.degenerate.item()) == (6, 1)


def test_metrics_of_several_processes_are_summed() -> None:
    maps, reference = random_maps(5), random_maps(5, seed=1)
    parts = [MapDrift("cosine"), MapDrift("cosine")]
    parts[0].update(maps[:2], reference[:2])
    parts[1].update(maps[2:], reference[2:])
    whole = MapDrift("cosine")
    for state, reduction in whole._reductions.items():
        gathered = torch.stack([getattr(part, state) for part in parts])
        setattr(whole, state, reduction(gathered))  # type: ignore[operator, misc]
    whole._update_count = 1
    assert whole.compute().item() == pytest.approx(METRICS["cosine"](maps, reference).mean().item())


def test_a_metric_with_nothing_to_measure_is_nan_and_a_wrong_name_is_refused() -> None:
    drift = MapDrift("spearman")
    drift.update(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert drift.compute().isnan()
    with pytest.raises(ValueError, match="`measure` to be one of spearman, jensen_shannon"):
        MapDrift("distance")
