"""Noise floor and unrelated level by hand, and drift over batches and processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, DriftMetric, MapDrift
from vit_explain_callback.metrics.reference import noise_floor, nudged, on_scale, output_holds, unrelated_level


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


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("size", "shift"), [((48, 64), (2, 1)), ((20, 20), (1, 1)), ((30, 160), (1, 2))])
def test_nudged_images_are_shifted_by_an_eighth_of_a_patch_and_grained(
    size: tuple[int, int], shift: tuple[int, int], mirror: bool
) -> None:
    """Pixel by pixel, on a grid of 3 x 8; what is left over is the noise."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0]).view(
        2, 1, 1, 1
    )
    found, seen = nudged(images, (3, 8), mirror), images.flip(3) if mirror else images
    moved = torch.empty_like(images)
    for row in range(size[0]):
        for column in range(size[1]):
            moved[..., row, column] = seen[..., max(0, row - shift[0]), max(0, column - shift[1])]
    noise = found - moved
    for image in range(2):
        deviation = moved[image].std()
        assert noise[image].std() / deviation == pytest.approx(0.05, rel=0.1)
        assert noise[image].mean().abs() < 0.01 * deviation
    assert found.equal(nudged(images, (3, 8), mirror))
    assert nudged(images.half(), (3, 8)).dtype is torch.float16


def test_the_output_holds_where_it_moves_less_than_half_as_far_as_between_images() -> None:
    """Against all pairs of images, for changes of any size."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    pairs = [(logits[i] - logits[j]).norm() ** 2 for i in range(5) for j in range(5) if i != j]
    between = torch.stack(pairs).mean().sqrt()
    direction = torch.nn.functional.normalize(torch.randn(5, 3, generator=generator))
    assert output_holds(logits, logits + 0.49 * between * direction)
    assert not output_holds(logits, logits + 0.51 * between * direction)
    assert output_holds(logits + 7, logits + 7)
    assert not output_holds(logits[:1], logits[:1]), "one image cannot tell"
    assert not output_holds(torch.ones(4, 2), torch.ones(4, 2)), "nor can outputs that are all the same"
    assert not output_holds(logits, logits * torch.nan)


@pytest.mark.parametrize(
    ("drift", "noise", "unrelated", "unchanged", "expected"),
    [
        (0.9, 0.9, 0.3, 1.0, 0.0),
        (0.3, 0.9, 0.3, 1.0, 1.0),
        (0.6, 0.9, 0.3, 1.0, 0.5),
        (1.0, 0.9, 0.4, 1.0, -0.2),
        (0.2, 0.1, 0.3, 0.0, 0.5),
        (0.5, 0.5, 0.4, 1.0, math.nan),  # noise matters nearly as much as another image
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
    with pytest.raises(ValueError, match="`metric` to be one of spearman, jensen_shannon"):
        MapDrift("distance")


def test_a_metric_says_which_way_is_better_and_where_a_plot_ends() -> None:
    facts = {name: (MapDrift(name).higher_is_better, *bounds(MapDrift(name))) for name in METRICS}
    assert facts == {
        "spearman": (True, -1, 1),
        "jensen_shannon": (False, 0, 1),
        "top10_iou": (True, 0, 1),
        "centroid_shift": (False, 0, 1),
        "cosine": (True, -1, 1),
    }
    ratio = MapDrift(DriftMetric("ratio", lambda maps, reference: maps.amax((1, 2)) / reference.amax((1, 2)), 1))
    assert (ratio.higher_is_better, *bounds(ratio)) == (None, None, None)
    assert (ratio.is_differentiable, ratio.full_state_update) == (False, False)


def bounds(drift: MapDrift) -> tuple[float | None, float | None]:
    return drift.plot_lower_bound, drift.plot_upper_bound


def test_a_metric_is_plotted_within_its_bounds() -> None:
    drift = MapDrift("jensen_shannon")
    drift.update(torch.rand(2, 4, 4), torch.rand(2, 4, 4))
    _, axes = drift.plot()
    low, high = axes.get_ylim()
    assert low <= 0 < 1 <= high
