"""The benchmark of methods: its intervals, its d' and its rule against what is known of them without it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from tests.benchmarks import fine_tuned, method_values, methods
from tests.benchmarks.fine_tuned import Task
from tests.benchmarks.method_rule import sign_of
from tests.benchmarks.method_tables import rank_correlations
from tests.benchmarks.resampling import (
    Candidate,
    Interval,
    bootstrap,
    compared,
    d_prime,
    decide,
    mean,
    separation,
)
from tests.models import random_images, tiny_vit
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.metrics.faithfulness import SHARES

ZERO = Interval(0.0, 0.0, 0.0)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    values = normal(1, 400)
    found = bootstrap(mean, [values])
    margin = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(margin, rel=0.1)


def test_the_same_images_at_three_seeds_are_not_three_times_as_many_images() -> None:
    values = normal(1, 400)
    one, three = (bootstrap(mean, [np.repeat(values, seeds, axis=0)]) for seeds in (1, 3))
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval() -> None:
    values = normal(3, 400) + np.array([[-1.0], [0.0], [1.0]])
    found = bootstrap(mean, [values])
    assert found.low < -0.5
    assert found.high > 0.5


def test_d_prime_is_that_of_the_area_under_the_roc_curve() -> None:
    same, other = normal(4000), normal(4000, seed=1) + 1.5
    greater = stats.mannwhitneyu(other, same).statistic / (4000 * 4000)
    assert d_prime(same, other) == pytest.approx(math.sqrt(2) * stats.norm.ppf(greater), abs=0.05)
    assert math.isnan(d_prime(np.ones(3), np.ones(3)))


@pytest.mark.parametrize(("metric", "same", "other"), [("spearman", 0.9, 0.1), ("centroid_shift", 0.1, 0.9)])
def test_separation_is_above_zero_where_other_images_differ_more(metric: str, same: float, other: float) -> None:
    values = 0.1 * normal(2, 50, 5) + np.array([same] * 3 + [other] * 2)
    found = separation(3, sign_of(metric))([values, values])
    assert found == pytest.approx(8, abs=0.8)


def candidate(method: str, gain: float, more: Interval, separated: Interval = ZERO) -> Candidate:
    return Candidate(method, Interval(gain, gain, gain), more, separated)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([candidate("better", 0.6, Interval(0.2, 0.1, 0.3))], "better"),
        ([candidate("tie", 0.6, Interval(0.2, -0.1, 0.5))], "now"),
        ([candidate("worse", 0.3, Interval(-0.1, -0.2, -0.05))], "now"),
        ([candidate("blind", 0.6, Interval(0.2, 0.1, 0.3), Interval(-2, -3, -1))], "now"),
        ([candidate("unsure", 0.6, Interval(0.2, 0.1, 0.3), Interval(-2, -4, 0.1))], "unsure"),
        (
            [
                candidate("blind", 0.9, Interval(0.5, 0.4, 0.6), Interval(-2, -3, -1)),
                candidate("good", 0.6, Interval(0.2, 0.1, 0.3)),
                candidate("best", 0.7, Interval(0.3, 0.2, 0.4)),
            ],
            "best",
        ),
    ],
)
def test_the_rule(others: list[Candidate], expected: str) -> None:
    assert decide([candidate("now", 0.4, ZERO), *others], "now") == expected


def test_methods_are_compared_image_by_image() -> None:
    images = 10 * normal(2, 60, 1)  # images differ far more than methods
    gains = {"now": [images], "new": [images + 0.5 + 0.1 * normal(2, 60, 1, seed=1)]}
    drift = {"now": [normal(2, 60, 5, seed=2) + np.array([0, 0, 0, 2, 2])]}
    drift["new"] = [drift["now"][0] * 3]  # d' does not depend on the scale
    now, new = compared(gains, drift, "now", separation(3, 1.0))
    assert new.more_gain.value == pytest.approx(0.5, abs=0.05)
    assert new.more_gain.high - new.more_gain.low < 0.1
    assert new.gain.high - new.gain.low > 1
    assert now.more_gain == ZERO
    assert new.more_separation.value == pytest.approx(0, abs=1e-9)
    assert new.more_separation.high - new.more_separation.low < 1e-9


def test_rank_correlations_equal_scipy() -> None:
    one, other = normal(9, 4).round(1), normal(9, 4, seed=1).round(1)
    expected = [stats.spearmanr(one[:, column], other[:, column]).statistic for column in range(4)]
    np.testing.assert_allclose(rank_correlations(one, other), expected)
    assert np.isnan(rank_correlations(np.ones((3, 1)), one[:3, :1])).all()


def tiny_task(seed: int = 0, count: int | None = None) -> Task:
    images = random_images(6, seed=seed)
    masks = torch.zeros(6, *images.shape[2:], dtype=torch.bool)
    masks[:, :16, :16] = True
    return Task(tiny_vit().eval(), images, torch.arange(6) % 3, masks, 8, (0.5, 0.5, 0.5))


def test_insertion_and_deletion_equal_a_loop_over_patches() -> None:
    task = tiny_task()
    patches = task.images.shape[2] // 8
    maps = torch.rand(6, patches, patches)
    with torch.no_grad():
        logits = task.model(task.images)
    explainer = Explainer(task.model, ["rollout"])
    explainer(task.images)
    found = method_values.faithfulness(task, explainer, maps, logits)
    for index, (image, label) in enumerate(zip(task.images, task.labels, strict=True)):
        order = maps[index].flatten().argsort().tolist()[::-1]  # the most relevant first
        curves: dict[str, list[float]] = {"deletion": [], "insertion": []}
        for share in (0, *SHARES, 1):
            count = round(share * len(order))
            for name, painted in (("deletion", order[:count]), ("insertion", order[count:])):
                canvas = image.clone()
                for patch in painted:
                    row, column = 8 * (patch // patches), 8 * (patch % patches)
                    canvas[:, row : row + 8, column : column + 8] = image.mean(dim=(1, 2))[:, None, None]
                with torch.no_grad():
                    curves[name].append(task.model(canvas[None])[0, label].item())
        ends = list(itertools.pairwise((0, *SHARES, 1)))
        for name, curve in curves.items():
            heights = [(one + other) / 2 for one, other in itertools.pairwise(curve)]
            expected = sum(height * (end - start) for height, (start, end) in zip(heights, ends, strict=True))
            assert found[name][index] == pytest.approx(expected, abs=1e-5), name


def test_images_are_changed_as_it_says() -> None:
    task = tiny_task()
    changed = method_values.changed_images(task, seed=0)
    assert tuple(changed) == method_values.CHANGES
    assert changed["mirror"][..., 0].equal(task.images[..., -1])
    assert changed["shift"][..., 2:, 2:].equal(task.images[..., :-2, :-2])
    assert changed["shift"][..., 1, 5].equal(task.images[..., 0, 3])
    noise = (changed["noise"] - task.images) * 0.5  # in units of the pixels
    assert noise.std().item() == pytest.approx(0.02, rel=0.05)


def test_it_measures_writes_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fine_tuned, "made_up_shapes", tiny_task)
    monkeypatch.setattr("tests.benchmarks.resampling.DRAWS", 20)
    monkeypatch.delenv("VIT_EXPLAIN_WEIGHTS", raising=False)
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    chosen = ["rollout", "attention", "grad_rollout", "grad_attention"]
    for seed, path in enumerate(files):
        methods.main(["--seeds", str(seed), "--methods", *chosen, "--output", str(path)])
    printed = capsys.readouterr()
    assert "shapes alone" in printed.err
    methods.main(["--from", *map(str, files), "--output", str(tmp_path / "both.json")])
    both = capsys.readouterr().out
    assert "## shapes: 6 images, seeds 0, 1" in both
    assert both.count("By the rule, `") == 2
    written = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    assert [run["seed"] for run in written["runs"]] == [0, 1]
    for run in written["runs"]:
        assert list(run["methods"]) == [*chosen, method_values.RANDOM]
        # A method without a class has no gradient to be scaled; one that is linear in it keeps its ranks.
        assert all(run["methods"][name]["scaled"] == pytest.approx([1.0] * 6) for name in ("rollout", "grad_attention"))
    methods.main(["--from", str(tmp_path / "both.json")])
    assert capsys.readouterr().out == both


def test_masks_are_those_of_their_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 3)):
        for name in ("a", "b"):
            for index in range(count):
                mask = np.zeros((224, 224), dtype=np.uint8)
                row, column = rng.integers(0, 150, size=2)
                mask[row : row + 60, column : column + 60] = 255
                for folder, picture in ((split, np.stack([mask] * 3, axis=-1)), ("masks", mask)):
                    if folder != "masks" or split == "val":
                        (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
                        Image.fromarray(picture).save(tmp_path / folder / name / f"{index}.png")
    monkeypatch.setattr(fine_tuned, "dinov2", lambda classes, seed: classes)
    seen: list[Any] = []

    def tuned(model: Any, batches: Any) -> Any:
        seen.extend(batches)
        return model

    monkeypatch.setattr(fine_tuned, "tuned", tuned)
    task = fine_tuned.photographs(tmp_path, seed=0, steps=3)
    assert len(seen) == 3
    assert task.model == 2
    assert sorted(task.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    bright = task.images.mean(dim=1) > 0
    assert (bright == task.masks).double().mean() > 0.98
    assert fine_tuned.photographs(tmp_path, seed=1, steps=1, count=4).masks.equal(task.masks[:4])
