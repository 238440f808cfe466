"""Which curves a page shows, and where drift stands on its scale."""

from __future__ import annotations

import math

import pytest

from vit_explain_callback.page.charts import block_values, charts, number

DRIFT = "explain/statistics/drift_baseline_spread/rollout/spearman"


def rows(noise: float = 0.8, unrelated: float = 0.2) -> list[dict[str, float]]:
    scale = {
        "explain/statistics/drift_scale/rollout/spearman/noise": noise,
        "explain/statistics/drift_scale/rollout/spearman/unrelated": unrelated,
    }
    spread = [{f"{DRIFT}/p10": m - 0.1, f"{DRIFT}/median": m, f"{DRIFT}/p90": m + 0.1} for m in (1.0, 0.5, math.nan)]
    return [spread[0] | scale | {"explain/faithfulness/rollout": 0.3, "explain/faithfulness/random": 0.0}, *spread[1:]]


def test_drift_stands_between_noise_and_unrelated() -> None:
    drift = charts(rows(), ["rollout"], [])[0]
    line, noise, unrelated = drift["lines"]
    assert (drift["title"], drift["method"]) == ("Drift", "rollout")
    assert line["values"] == [pytest.approx((1.0 - 0.8) / (0.2 - 0.8), rel=1e-3), 0.5, None]
    assert line["low"][1] == pytest.approx((0.4 - 0.8) / (0.2 - 0.8), rel=1e-3)
    assert line["high"][1] == pytest.approx((0.6 - 0.8) / (0.2 - 0.8), rel=1e-3)
    assert noise == {"name": "noise", "values": [0.0] * 3, "reference": True}
    assert unrelated == {"name": "unrelated", "values": [1.0] * 3, "reference": True}


@pytest.mark.parametrize("scale", [(0.3, 0.25), (math.nan, 0.2)])
def test_without_a_scale_the_rank_correlation_is_shown(scale: tuple[float, float]) -> None:
    drift = charts(rows(*scale), ["rollout"], [])[0]
    assert drift["title"] == "Rank correlation with the baseline"
    assert [line["values"] for line in drift["lines"]] == [[1.0, 0.5, None]]


def test_charts_without_a_value_and_lines_without_one_are_left_out() -> None:
    found = charts(rows(), ["rollout"], ["object"])
    assert [chart["title"] for chart in found] == ["Drift", "Faithfulness"]
    assert [line["name"] for line in found[1]["lines"]] == ["rollout", "random order"]
    assert found[1]["lines"][1] == {"name": "random order", "values": [0.0, None, None], "reference": True}
    (output,) = charts([{"explain/probe/output": 2.0}], [], [])
    assert (output["title"], output["lines"]) == ("Output", [{"name": "output", "values": [2.0]}])


def test_blocks_are_rows_in_order() -> None:
    found = block_values(
        [
            {f"explain/statistics/attention/entropy/block_{block:02d}": block + step for block in (2, 100, 11)}
            for step in (0, 1)
        ]
    )
    assert found == {"attention/entropy": [[2, 3], [11, 12], [100, 101]]}
    assert block_values([{"explain/probe/accuracy": 1.0}]) == {}


def test_numbers_are_short_and_finite() -> None:
    assert [number(value) for value in (1 / 3, 12345.6, math.nan, math.inf)] == [0.3333, 12350.0, None, None]
