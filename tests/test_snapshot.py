"""Snapshots on disk, and which of a run's snapshots are kept and shown."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import torch

from vit_explain_callback.snapshot import History, Snapshot


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(2, 4, generator=generator)
    maps = {"rollout": torch.rand(2, 3, 5, generator=generator), "grad_rollout_max_0.9": torch.zeros(2, 3, 5)}
    return Snapshot(step, maps, logits, torch.tensor([1, 3]))


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    assert one.step == other.step
    assert one.maps.keys() == other.maps.keys()
    assert all(one.maps[name].equal(other.maps[name]) for name in one.maps)
    assert one.logits.equal(other.logits)
    assert one.target.equal(other.target)


def test_a_snapshot_survives_its_file(tmp_path: Path) -> None:
    snapshot(120).save(tmp_path / "a.safetensors")
    assert_equal(Snapshot.load(tmp_path / "a.safetensors"), snapshot(120))


def test_prediction_and_probability() -> None:
    one = Snapshot(0, {}, torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([2]))
    assert one.prediction.tolist() == [1]
    torch.testing.assert_close(one.target_probability, (1 / (torch.tensor([2.0]).exp() + 2)).double())


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
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    restored = History()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.count == 3
    for one, other in zip(restored.snapshots, history.snapshots, strict=True):
        assert_equal(one, other)
