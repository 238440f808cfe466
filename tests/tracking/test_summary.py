"""The verdict in words, against histories made by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.attention import BlockStatistics
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Reliability, Snapshot
from vit_explain_callback.tracking.summary import summary

COUNT = 6
GRID = (4, 5)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*(shape or (COUNT, *GRID)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def snapshot(step: int, maps: dict[str, Tensor], classes: list[int], checks: Reliability | None = None) -> Snapshot:
    logits = torch.nn.functional.one_hot(torch.tensor(classes), 3).double() * 4
    return Snapshot(step, Explanation(maps, logits, torch.zeros(COUNT, dtype=torch.long)), checks)


def said_of(run: History, labels: Tensor | None, regions: dict[str, Tensor], names: list[str] | None) -> str:
    return summary(run, Probe(None, [], labels, regions, names))


def history(*snapshots: Snapshot) -> History:
    found = History()
    for one in snapshots:
        found.add(one)
    return found


def test_what_changed_most_and_when() -> None:
    start = noise(0)
    slightly = start + 0.01 * noise(1)
    later = slightly.clone()
    later[4] = start[4].max() - start[4]  # the ranking turned round
    run = history(
        snapshot(0, {"rollout": start}, [0] * COUNT),
        snapshot(10, {"rollout": slightly}, [0] * COUNT),
        snapshot(20, {"rollout": later}, [0, 0, 0, 0, 2, 0]),
        snapshot(30, {"rollout": later}, [0, 0, 0, 0, 2, 1]),
    )
    text = said_of(run, torch.zeros(COUNT, dtype=torch.long), {}, ["cat", "dog", "hare"])
    assert "6 probe images over 4 snapshots, steps 0 to 30" in text
    assert "predictions: 2 of 6 changed, accuracy 1.00 → 0.67" in text
    assert "most in image 4 (-1.00, predicted cat, now hare); fastest between steps 10 and 20" in text
    assert "not that the change is for the worse" in text
    assert "accuracy" not in said_of(run, None, {}, None)
    assert "predicted class 0, now class 2" in said_of(run, None, {}, None)


def test_drift_is_put_on_its_scale_and_faithfulness_against_chance() -> None:
    maps = {"rollout": noise(0)}

    def checks(gain: float, spread: float, mirror: float) -> Reliability:
        signs = torch.tensor([1.0, -1.0] * (COUNT // 2), dtype=torch.float64)
        gains = {"rollout": gain + spread * signs, "random": torch.zeros(COUNT, dtype=torch.float64)}
        return Reliability({"rollout": maps["rollout"] + mirror * noise(5)}, gains)

    def said(after: Reliability, moved: float) -> str:
        now = {"rollout": maps["rollout"] + moved * noise(9)}
        first = snapshot(0, maps, [0] * COUNT, checks(0.3, 0.1, 0.05))
        return said_of(history(first, snapshot(9, now, [0] * COUNT, after)), None, {}, None)

    good = said(checks(0.5, 0.1, 0.05), 0.5)
    assert "(SRG) 0.30 → 0.50, +0.50 ± 0.09 against a random order: more faithful than chance" in good
    assert "% of the way between" in good
    assert "within the noise" in said(checks(0.5, 0.1, 0.05), 0.001)
    assert "not told from chance" in said(checks(0.05, 0.2, 0.05), 0.5)


def test_regions_and_blocks() -> None:
    left, right = torch.zeros(COUNT, 8, 10, dtype=torch.bool), torch.zeros(COUNT, 8, 10, dtype=torch.bool)
    left[:, :, :2], right[:, :, 8:] = True, True
    before, after = noise(0) * 0.01, noise(1) * 0.01
    before[:, :, 0], after[:, :, 4] = 1, 1
    one, other = noise(2, COUNT, 3, *GRID), noise(2, COUNT, 3, *GRID)
    other[:, 1] = noise(3)
    rest = [torch.zeros(COUNT, 3)] * 5
    snapshots = [snapshot(0, {"rollout": before}, [0] * COUNT), snapshot(5, {"rollout": after}, [0] * COUNT)]
    snapshots = [
        Snapshot(s.step, replace(s.explanation, blocks=BlockStatistics(rows, rows, *rest)))
        for s, rows in zip(snapshots, (one, other), strict=True)
    ]
    text = said_of(history(*snapshots), None, {"left": left, "right": right}, None)
    assert (
        "lift (1 = its share of the image): right 0.0 → 4.9, left 4.9 → 0.0" in text or "left 4.9 → 0.0, right" in text
    )
    assert "changed most in block 2 of 3" in text


def test_degenerate_maps_are_said_and_many_methods_are_cut_to_fifteen_lines() -> None:
    zero = {"rollout": torch.zeros(COUNT, *GRID)}
    run = history(snapshot(0, zero, [0] * COUNT), snapshot(1, zero, [0] * COUNT))
    assert "rollout: no drift can be measured" in said_of(run, None, {}, None)
    many = {f"rollout_from{i}": noise(i) for i in range(1, 13)}
    text = said_of(history(snapshot(0, many, [0] * COUNT), snapshot(1, many, [0] * COUNT)), None, {}, None)
    assert len(text.splitlines()) <= 15
    assert "7 of 12 methods are left out here." in text


def test_one_snapshot_alone_has_a_said_of() -> None:
    text = said_of(history(snapshot(3, {"rollout": noise(0)}, [0] * COUNT)), None, {}, None)
    assert "over 1 snapshots, steps 3 to 3" in text
    assert "rank correlation with the baseline 1.00" in text
