"""A measure of drift of one's own: in the scalars, the curves, the page, and `MapDrift`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_images, tiny_vit
from tests.runs import events, fit
from vit_explain_callback import (
    DriftMetric,
    Explainer,
    ExplanationTracker,
    MapDrift,
    Probe,
    ViTExplainCallback,
    load_run,
)
from vit_explain_callback.metrics.drift import METRICS, spearman
from vit_explain_callback.page.document import page


def total(maps: Tensor, reference: Tensor) -> Tensor:
    return (maps - reference).abs().sum(dim=(1, 2))


TOTAL = DriftMetric("total", total, unchanged=0)


def two_snapshots(folder: Path | None, metrics: Any, **options: Any) -> ExplanationTracker:
    model = tiny_vit()
    probe = Probe.of(random_images(4), torch.tensor([0, 1, 2, 0]))
    tracker = ExplanationTracker(Explainer(model, ["grad_rollout"]), probe, folder=folder, metrics=metrics, **options)
    tracker.observe(0)
    with torch.no_grad():
        for parameter in model.blocks[-1].parameters():
            parameter.mul_(1.5)
    tracker.observe(3)
    return tracker


def test_the_built_in_measures_are_the_same_objects() -> None:
    assert all(isinstance(metric, DriftMetric) and metric.name == name for name, metric in METRICS.items())
    assert METRICS["spearman"].function is spearman


def test_it_is_in_the_scalars_the_curves_and_the_page(tmp_path: Path) -> None:
    tracker = two_snapshots(tmp_path / "run", [TOTAL, "cosine"])
    values = tracker.scalars()
    tracker.finish()
    first, now = (snapshot.maps["grad_rollout"].double() for snapshot in tracker.history.snapshots)
    expected = sum(float((b - a).abs().sum()) for a, b in zip(first, now, strict=True)) / 4
    assert values["explain/drift/baseline_total/grad_rollout"] == pytest.approx(expected, rel=1e-5)
    assert values["explain/drift/previous_total/grad_rollout"] == pytest.approx(expected, rel=1e-5)
    cosines = [float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) for a, b in zip(first, now, strict=True)]
    assert values["explain/drift/baseline_cosine/grad_rollout"] == pytest.approx(sum(cosines) / 4, rel=1e-5)
    assert not any(tag.startswith("explain/statistics/") for tag in values)

    found = load_run(tmp_path / "run", metrics=[TOTAL])
    assert found.scalars[1]["explain/drift/baseline_total/grad_rollout"] == pytest.approx(expected, rel=1e-5)
    noise = float(total(first, found.history.baseline.reliability.nudged["grad_rollout"]).mean())  # type: ignore[union-attr]
    assert found.scalars[0]["explain/statistics/drift_scale/grad_rollout/total/noise"] == pytest.approx(noise, rel=1e-5)
    for text in (page(found), (tmp_path / "run" / "report.html").read_text(encoding="utf-8")):
        charts = {chart["title"]: chart for chart in _data(text)["runs"][0]["charts"]}
        lines = {line["name"]: line["values"] for line in charts["Drift: total"]["lines"]}
        median = float(total(now, first).quantile(0.5))
        assert lines["median image"] == [0, pytest.approx(median, rel=1e-3)]
        assert lines["noise"] == [pytest.approx(noise)] * 2
    assert "Drift: total" not in page(load_run(tmp_path / "run"))


def _data(text: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_all_of_it_is_logged_with_full_detail() -> None:
    spread = {
        f"explain/statistics/drift_baseline_spread/grad_rollout/total/{part}" for part in ("p10", "median", "p90")
    }
    tags = set(two_snapshots(None, [TOTAL], detail="full").scalars())
    assert spread | {"explain/drift/baseline_total/grad_rollout"} <= tags


def test_the_callback_logs_it(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(["rollout"], metrics=[TOTAL], num_images=4), tmp_path)
    assert "explain/drift/baseline_total/rollout" in events(trainer).Tags()["scalars"]
    assert "explain/drift/baseline_total/rollout" in trainer.callback_metrics


def test_map_drift_takes_it() -> None:
    drift = MapDrift(TOTAL)
    one, other = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    drift.update(one, other)
    assert drift.compute().item() == pytest.approx(float((one.double() - other.double()).abs().sum()) / 3)
    with pytest.raises(TypeError, match="Expected `metric` to be a name or a `DriftMetric`"):
        MapDrift(total)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `metric` to be one of spearman"):
        MapDrift("total")


BAD: dict[str, tuple[Any, str]] = {
    "raises": (lambda maps, reference: maps.nothing, "AttributeError"),
    "shape": (
        lambda maps, reference: maps - reference,
        r"tensor of shape \(4,\), one value per image, but got \(4, 4, 4\)",
    ),
    "number": (lambda maps, reference: 0.5, r"one value per image, but got float"),
}


@pytest.mark.parametrize("bad", BAD)
def test_one_that_fails_is_said_once_and_costs_only_itself(bad: str) -> None:
    function, said = BAD[bad]
    metrics = [DriftMetric("bad", function, unchanged=0), TOTAL]
    with pytest.warns(UserWarning, match=f"cannot measure drift by `bad`, and training goes on: .*{said}") as caught:
        values = two_snapshots(None, metrics).scalars()
    assert len(caught) == 1
    assert "explain/drift/baseline_total/grad_rollout" in values
    assert "explain/drift/baseline_rank_correlation/grad_rollout" in values
    assert not any("bad" in tag for tag in values)


def test_what_is_no_metric_is_refused_before_training() -> None:
    for metrics, kind, said in (
        (["totl"], ValueError, "Expected `metrics` to name spearman, .*, but got 'totl'"),
        ([total], TypeError, "A function of your own goes in as `DriftMetric"),
        ([TOTAL, TOTAL], ValueError, "each only once"),
        ([DriftMetric("cosine", total, 0)], ValueError, "`cosine` is taken"),
        ([DriftMetric("rank_correlation", total, 0)], ValueError, "`rank_correlation` is taken"),
    ):
        with pytest.raises(kind, match=said):
            ViTExplainCallback(metrics=metrics)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `name` of letters"):
        DriftMetric("a/b", total, 0)
    with pytest.raises(TypeError, match=r"Expected `a` to have a `function\(maps, reference\)` and a number"):
        DriftMetric("a", total, "zero")  # type: ignore[arg-type]
