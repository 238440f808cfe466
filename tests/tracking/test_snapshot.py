"""Snapshots on disk, and which of a run's snapshots are kept and shown."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.attention import BlockStatistics
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.snapshot import Reliability, Snapshot


def snapshot(step: int, whole: bool = False, checked: bool = False) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(2, 4, generator=generator)
    maps = {"rollout": torch.rand(2, 3, 5, generator=generator), "grad_rollout_max_0.9": torch.zeros(2, 3, 5)}
    maps_by_block = [torch.rand(2, 4, 3, 5, generator=generator) for _ in range(2)]
    blocks = BlockStatistics(*maps_by_block, *(torch.rand(2, 4, generator=generator) for _ in range(5)))
    checks = Reliability({name: torch.rand(2, 3, 5) for name in maps}, {n: torch.rand(2) for n in (*maps, "random")})
    explanation = Explanation(maps, logits, torch.tensor([1, 3]), blocks if whole else None)
    return Snapshot(step, explanation, checks if whole or checked else None)


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert first.pop("step") == second.pop("step")
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("whole", [False, True])
def test_a_snapshot_survives_its_file(tmp_path: Path, whole: bool) -> None:
    one = snapshot(120, whole)
    one.save(tmp_path / "a.safetensors")
    loaded = Snapshot.load(tmp_path / "a.safetensors")
    assert_equal(loaded, one)
    assert (loaded.blocks is not None, loaded.reliability is not None) == (whole, whole)


def test_prediction_and_probability() -> None:
    one = Snapshot(0, Explanation({}, torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([2])))
    assert one.prediction.tolist() == [1]
    torch.testing.assert_close(one.target_probability(), (1 / (torch.tensor([2.0]).exp() + 2)).double())


def history_of(steps: range | list[int], capacity: int = 48) -> History:
    history = History(capacity)
    for step in steps:
        history.add(snapshot(step))
    return history


def test_a_long_history_keeps_the_baseline_the_latest_two_and_a_logarithmic_choice() -> None:
    history = history_of(range(0, 10_000, 10), capacity=20)
    steps = [one.step for one in history.snapshots]
    assert history.count == 1000
    assert len(steps) == 20
    assert steps[0] == 0 == history.baseline.step
    assert steps[-2:] == [9980, 9990]
    assert steps == sorted(steps)
    assert sum(step < 1000 for step in steps) >= 8  # early change is where most of it happens
    assert sum(step > 1000 for step in steps) >= 5


def test_columns_begin_with_the_baseline_and_end_with_now() -> None:
    few = history_of([0, 5, 9])
    assert [one.step for one in few.columns(9)] == [0, 5, 9]
    many = [one.step for one in history_of(range(0, 460, 10)).columns(9)]
    assert len(many) == 9 == len(set(many))
    assert many[0] == 0
    assert many[1] == 10
    assert many[-1] == 450
    gaps = [after - before for before, after in itertools.pairwise(many)]
    assert gaps[-1] > gaps[0]
    assert [one.step for one in history_of([0, 1, 2, 3]).columns(2)] == [0, 3]


def test_state_survives_a_checkpoint_loaded_with_weights_only() -> None:
    history = history_of([0, 7, 19])
    history.add(snapshot(20, whole=True))
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    restored = History()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.count == 4
    for one, other in zip(restored.snapshots, history.snapshots, strict=True):
        assert_equal(one, other)


def test_only_the_first_and_the_latest_keep_what_is_large() -> None:
    history = History()
    for step in range(6):
        history.add(snapshot(step, whole=step in (0, 2, 4), checked=step == 3))
    assert [one.step for one in history.snapshots if one.blocks is not None] == [0]
    assert [one.step for one in history.snapshots if one.reliability is not None] == [0, 4]
    assert len(history.checked) == 2
    checks = snapshot(0, checked=True).reliability
    assert checks is not None
    history.update_latest(checks)
    assert history.checked[-1] is history.now.reliability is checks
    assert (history.now.step, history.previous.step) == (5, 4)


def test_the_drift_of_the_blocks_is_kept_of_every_snapshot_that_is_kept() -> None:
    """Against scipy, although the blocks themselves are let go."""
    history = History(capacity=5)
    for step in range(8):
        history.add(snapshot(step, whole=True))
    kept = [one.step for one in history.snapshots]
    assert sorted(history.block_drift) == kept
    assert len(kept) == 5
    baseline = snapshot(0, whole=True).blocks
    for step in kept:
        blocks = snapshot(step, whole=True).blocks
        assert baseline is not None
        assert blocks is not None
        expected = [
            np.mean([spearmanr(blocks.rows[i, block].ravel(), baseline.rows[i, block].ravel())[0] for i in range(2)])
            for block in range(4)
        ]
        assert history.block_drift[step].tolist() == pytest.approx(expected, abs=1e-6)
    restored = History()
    restored.load_state_dict(history.state_dict())
    assert restored.block_drift.keys() == history.block_drift.keys()
    assert all(row.equal(history.block_drift[step]) for step, row in restored.block_drift.items())
    assert history_of([0, 1]).block_drift == {}
