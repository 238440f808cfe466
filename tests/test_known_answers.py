"""The logic of the benchmark of planted shortcuts: what is planted, when a signal alarms, and who is ahead."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from tests.benchmarks import known_answers
from tests.benchmarks.crossings import alarm, bootstrap, lasting_fall, threshold, wilson
from tests.benchmarks.planted import Hints, ShapesData
from tests.benchmarks.planted_runs import Plan, Row, block_depth, run
from tests.benchmarks.planted_signals import signals
from tests.models import random_images, tiny_vit


def test_an_alarm_is_known_at_a_snapshot_and_not_before() -> None:
    curve = [(0, 0.1), (4, 0.2), (8, 0.9), (12, 0.1)]
    assert alarm(curve, 0.2) == 8  # at the threshold is not above it
    assert math.isnan(alarm(curve, 0.9))


def test_a_fall_that_is_made_good_does_not_count() -> None:
    assert lasting_fall([(0, 1.0), (4, 0.0), (8, 1.0), (12, 0.0)], 0.5) == 10


def test_no_quiet_run_passes_the_threshold() -> None:
    assert threshold([0.4, 1.0], 0.25) == 1.25
    assert threshold([-4.0, -1.0], 0.25) == -0.75  # up, not away from 0


def test_intervals_are_those_of_scipy() -> None:
    for count, of in ((0, 20), (9, 10), (10, 10)):
        expected = scipy.stats.binomtest(count, of).proportion_ci(method="wilson")
        assert wilson(count, of) == pytest.approx((expected.low, expected.high), abs=1e-6)
    values = [3.0, -1.0, 4.0, 8.0, 2.0, 6.0, 0.0, 5.0]
    resampled = scipy.stats.bootstrap([values], np.mean, method="percentile", rng=np.random.default_rng(0))
    assert bootstrap(values) == pytest.approx(tuple(resampled.confidence_interval), abs=0.3)


def test_what_is_planted_is_told_by_the_hint_alone() -> None:
    data, told = ShapesData(), Hints("label", "label")
    one, other = (data.batch("val", 3, range(24), hints) for hints in (told, Hints()))
    assert one.labels.equal(other.labels)
    assert one.masks.equal(other.masks)
    assert not (one.masks & data.corner_masks(24)).any()
    corners = one.images[:, :, 0, 0]
    for label in range(data.classes):
        same = corners[one.labels == label]
        assert same.equal(same[:1].expand_as(same))
    assert len({tuple(colour) for colour in corners.tolist()}) == data.classes
    objects = one.masks[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(one.images[objects], other.images[objects])
    # Of four classes, chance names the right one in about six of 24.
    agree = (corners == other.images[:, :, 0, 0]).all(dim=1).sum()
    assert 1 <= agree <= 14


def test_a_class_settles_at_the_block_from_which_on_the_head_gives_it() -> None:
    vit, images = tiny_vit().eval(), random_images(3)
    depth, logits = block_depth(vit, images)
    torch.testing.assert_close(logits, vit(images))
    final = logits.argmax(dim=1)
    for image in range(3):
        tokens, classes = vit._pos_embed(vit.patch_embed(images)), []
        for block in vit.blocks:
            tokens = block(tokens)
            classes.append(int(vit.forward_head(vit.norm(tokens))[image].argmax()))
        first = next(k for k in range(len(classes)) if all(c == final[image] for c in classes[k:]))
        assert depth[image] == first + 1


def _row(seed: int, condition: str, corner: list[list[float]], accuracy: list[float], data: str = "shapes") -> Row:
    count = len(corner)
    return Row(
        data,
        condition,
        seed,
        list(range(0, 4 * count, 4)),
        accuracy,
        {"mass/rollout/label/corner": corner, "correlation/rollout/label": [[1.0, 0.8]] * count},
        {"area/corner": 0.1, "noise/rollout/label": 0.95, "unrelated/rollout/label": 0.5},
    )


def test_signals_compare_each_image_with_itself() -> None:
    found = signals(_row(0, "corner", [[0.1, 0.2], [0.2, 0.4]], [1.0, 0.5]))
    before, after = (np.log(np.array(m) / (1 - np.array(m))) for m in ([0.1, 0.2], [0.2, 0.4]))
    assert found["lift rollout label", "corner"] == pytest.approx([1.5, 3.0])
    assert found["lift rollout label rise", "corner"] == pytest.approx([0.0, (after - before).mean()])
    paired = scipy.stats.ttest_rel(after, before).statistic
    assert found["lift rollout label z", "corner"] == pytest.approx([0.0, paired])
    assert found["lift rollout label spread", "corner"][1] == pytest.approx(
        (after - before).mean() / before.std(ddof=1)
    )
    assert found["drift rollout label", "any"] == pytest.approx([0.1, 0.1])
    assert found["noise_to_unrelated rollout label", "any"] == pytest.approx([(0.95 - 0.9) / 0.45] * 2)


def test_thresholds_come_from_the_threshold_seeds_alone() -> None:
    quiet, loud = [[0.1, 0.1], [0.12, 0.12], [0.1, 0.1]], [[0.1, 0.1], [0.1, 0.1], [0.5, 0.5]]
    fall, flat = [0.9, 0.9, 0.3], [0.9, 0.9, 0.9]
    rows = [_row(100, "more data", quiet, flat), _row(0, "more data", quiet, flat), _row(1, "mirrored", loud, flat)]
    rows += [_row(2, "corner", loud, fall), _row(3, "corner", quiet, fall), _row(4, "corner", loud, flat)]
    judged, controls = known_answers.judge(rows, "corner")
    lift = judged["lift rollout label"]
    assert controls == 2
    assert lift.threshold == pytest.approx(1.2 * 1.25)
    assert lift.alarms == ["shapes mirrored 1"]
    assert lift.raised["shapes"] == [True, False, True]
    # Half of the loss is at step 6; the alarm at 8; no alarm counts as one at 12.
    assert lift.leads["shapes"][:2] == [-2.0, -6.0]
    assert math.isnan(lift.leads["shapes"][2])  # no loss, no lead


def test_a_run_that_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def pretend(data: ShapesData, _plan: Plan, _start: object, condition: str, seed: int) -> Row:
        made.append((condition, seed))
        return _row(seed, condition, [[0.1, 0.1], [0.3, 0.3]], [0.9, 0.3])

    monkeypatch.setattr(known_answers, "started", lambda *_arguments: None)
    monkeypatch.setattr(known_answers, "run", pretend)
    output = tmp_path / "runs.jsonl"
    output.write_text(json.dumps(dataclasses.asdict(pretend(ShapesData(), Plan(0, 0, 0, 0, 0, 0), None, "corner", 0))))
    with output.open("a") as file:
        file.write("\n")
    made.clear()
    known_answers.main(["--output", str(output), "--only", "shapes/*", "--seeds", "100", "0"])
    assert ("corner", 0) not in made
    assert ("more data", 100) in made
    assert len(made) == 3
    assert "| lift rollout label |" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [["20"], ["0"], ["100"], ["20", "100"]])
def test_any_seeds_end_with_their_tables_or_with_what_these_lack(
    seeds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(data: ShapesData, _plan: Plan, _start: object, condition: str, seed: int) -> Row:
        return _row(seed, condition, [[0.1, 0.1], [0.3, 0.3]], [0.9, 0.3])

    monkeypatch.setattr(known_answers, "started", lambda *_arguments: None)
    monkeypatch.setattr(known_answers, "run", pretend)
    known_answers.main(["--output", str(tmp_path / "runs.jsonl"), "--only", "shapes/*", "--seeds", *seeds])
    printed = capsys.readouterr().out
    assert ("| lift rollout label |" in printed) == ("100" in seeds)
    assert ("No tables: thresholds are made of seeds 100 … 104" in printed) == ("100" not in seeds)


def test_a_short_run_keeps_every_quantity_of_every_image() -> None:
    data = ShapesData()
    torch.manual_seed(0)
    row = run(data, Plan(0, 2, 1, 4, 3, 4), data.model(), "corner", 0)
    assert row.steps == [0, 1, 2]
    assert len(row.accuracy) == 3
    assert {len(snapshot) for value in row.values.values() for snapshot in value} == {3}
    found = signals(row)
    assert {"lift grad_rollout label z", "effect", "depth label rise"} <= {name for name, _ in found}
    assert all(len(curve) == 3 for curve in found.values())
    again = Row(**json.loads(json.dumps(dataclasses.asdict(row))))
    assert str(signals(again)) == str(found)  # NaN is not equal to itself
