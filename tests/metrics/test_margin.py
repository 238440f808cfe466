"""Margins of few values: Student's quantile against scipy's, and how often the interval misses the truth."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from vit_explain_callback.metrics.margin import margin, student_quantile


@pytest.mark.parametrize("level", [0.01, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999])
def test_the_quantile_is_that_of_scipy(level: float) -> None:
    for freedom in [*range(1, 201), 997, 1000]:
        expected = scipy.stats.t.ppf((1 + level) / 2, freedom)
        assert student_quantile(level, freedom) == pytest.approx(expected, rel=1e-10), freedom


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_misses_the_mean_as_often_as_it_says(count: int, level: float) -> None:
    runs = 4000
    values = 3 + 2 * torch.randn(runs, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    missed = sum(abs(own.mean().item() - 3) > (margin(own, level) or 0.0) for own in values) / runs
    deviation = math.sqrt(level * (1 - level) / runs)
    assert abs(missed - (1 - level)) < 3.5 * deviation


def test_the_margin_is_of_the_values_that_are_known() -> None:
    known = [0.3, -0.1, 0.7, 0.2]
    low, high = scipy.stats.t.interval(0.95, 3, scipy.stats.tmean(known), scipy.stats.sem(known))
    for values in (known, [math.nan, *known, math.inf]):
        assert margin(torch.tensor(values, dtype=torch.float64)) == pytest.approx((high - low) / 2)
    assert margin(torch.tensor([[0.3, -0.1], [0.7, 0.2]])) == pytest.approx((high - low) / 2)
    assert margin(torch.tensor([1, 2, 3])) == pytest.approx(2.4841377)
    assert margin(torch.ones(5)) == 0
    for few in ([], [1.0], [1.0, math.nan]):
        assert margin(torch.tensor(few)) is None


@pytest.mark.parametrize(("level", "freedom"), [(0.0, 3), (1.0, 3), (math.nan, 3), (0.95, 0), (95, 3)])
def test_what_is_no_probability_is_refused(level: float, freedom: int) -> None:
    with pytest.raises(ValueError, match=r"Expected `level` in \(0, 1\) and `freedom` of at least 1"):
        student_quantile(level, freedom)
