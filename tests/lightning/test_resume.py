"""A run that is stopped and resumed: the same images and baseline, no snapshot twice or missing, the same curves."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Subset

from tests.models import random_images
from tests.processes import python
from tests.runs import Classifier, Pictures, events, fit, loader, quiet, saved
from vit_explain_callback import ViTExplainCallback
from vit_explain_callback.tracking.snapshot import Snapshot

CURVES = (
    "explain/drift/baseline_rank_correlation/grad_rollout",
    "explain/drift/previous_rank_correlation/rollout",
    "explain/probe/accuracy",
)


def small(**schedule: Any) -> ViTExplainCallback:
    return quiet(num_images=4, **schedule)


def state_in(checkpoint: Path) -> dict[str, Any]:
    """What our callback saved, whatever was asked of it."""
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    (found,) = (state for key, state in states.items() if key.startswith("ViTExplainCallback"))
    assert isinstance(found, dict)
    return found


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("=")[2])


def test_a_resumed_run_keeps_its_baseline_and_takes_no_snapshot_twice(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_images": 4, "num_shown": 1, "detail": {"page": False}}
    whole = fit(ViTExplainCallback(**options), tmp_path / "whole", max_epochs=4)
    first = fit(ViTExplainCallback(**options), tmp_path / "parts", max_epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = fit(ViTExplainCallback(**options), tmp_path / "parts", max_epochs=4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert [snapshot.step for snapshot in saved(second)] == [12, 16]
    for tag in (
        "explain/drift/baseline_rank_correlation/grad_rollout",
        "explain/drift/previous_rank_correlation/rollout",
    ):
        curve = [(event.step, event.value) for run in (first, second) for event in events(run).Scalars(tag)]
        assert curve == [(event.step, event.value) for event in events(whole).Scalars(tag)]


@pytest.mark.parametrize("schedule", [{"every_n_epochs": 1}, {"every_n_steps": 2}])
def test_a_run_resumed_from_lightnings_own_checkpoint_misses_no_snapshot(
    tmp_path: Path, schedule: dict[str, Any]
) -> None:
    """`ModelCheckpoint` saves after validation, and so before the snapshot at the end of that epoch."""
    whole = fit(small(**schedule), tmp_path / "whole", max_epochs=3)
    first = fit(small(**schedule), tmp_path / "first", max_epochs=2, enable_checkpointing=True)
    (checkpoint,) = Path(first.log_dir or "").rglob("*.ckpt")
    resumed: dict[str, Any] = {"enable_checkpointing": True, "ckpt_path": str(checkpoint)}
    second = fit(small(**schedule), tmp_path / "second", max_epochs=3, **resumed)
    tag = "explain/drift/baseline_rank_correlation/grad_rollout"
    curve = {event.step: event.value for run in (first, second) for event in events(run).Scalars(tag)}
    assert curve == {event.step: event.value for event in events(whole).Scalars(tag)}


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks")  # options are part of the state's key
def test_other_images_after_resuming_are_said_and_start_a_new_baseline(tmp_path: Path) -> None:
    trainer = fit(small(), tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    other = quiet(images=random_images(3, seed=5))
    with pytest.warns(UserWarning, match="a new baseline is taken"):
        resumed = fit(other, tmp_path, max_epochs=3, ckpt_path=str(tmp_path / "half.ckpt"))
    assert [snapshot.step for snapshot in saved(resumed)] == [8, 12]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("schedule", [{"every_n_epochs": 1}, {"every_n_epochs": 2}, {"every_n_steps": 2}])
@pytest.mark.parametrize("every_n_train_steps", [3, 4])
def test_a_run_resumed_from_any_checkpoint_gives_the_rest_of_the_curves(
    tmp_path: Path, schedule: dict[str, Any], every_n_train_steps: int
) -> None:
    """A checkpoint written at the last step of an epoch comes before the snapshot of that epoch.

    The batches are alike, because Lightning starts a loader anew when it resumes within an epoch.
    """

    def run(name: str, ckpt_path: str | None = None) -> pl.Trainer:
        keeper = ModelCheckpoint(tmp_path / name, every_n_train_steps=every_n_train_steps, save_top_k=-1)
        return fit(
            small(**schedule),
            tmp_path / name,
            max_epochs=3,
            enable_checkpointing=True,
            ckpt_path=ckpt_path,
            more_callbacks=[keeper],
            train=loader(Subset(Pictures(), [0, 1, 2, 3] * 4)),
        )

    whole = run("whole")
    steps = [snapshot.step for snapshot in saved(whole)]
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=step_of)
    assert len(checkpoints) == 12 // every_n_train_steps
    for checkpoint in checkpoints[:-1]:
        known = state_in(checkpoint)["snapshots"]
        resumed = run(checkpoint.stem, str(checkpoint))
        assert [snapshot["step"] for snapshot in known] + [snapshot.step for snapshot in saved(resumed)] == steps
        for tag in CURVES:
            expected = {event.step: event.value for event in events(whole).Scalars(tag)}
            rest = {event.step: event.value for event in events(resumed).Scalars(tag)}
            assert rest == {step: value for step, value in expected.items() if step > known[-1]["step"]}


KILLED = """
    import os, signal, sys
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from tests.runs import fit, quiet

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

    keeper = ModelCheckpoint(sys.argv[1], every_n_train_steps=2, save_top_k=-1)
    fit(quiet(every_n_steps=1, num_images=4), sys.argv[1], enable_checkpointing=True,
        more_callbacks=[Kill(), keeper])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_is_resumed_where_its_last_checkpoint_stands(tmp_path: Path) -> None:
    done = python("-c", textwrap.dedent(KILLED), str(tmp_path / "killed"))
    assert done.returncode == -9, done.stderr
    (folder,) = tmp_path.rglob("explanations")
    files = sorted(folder.glob("step_*"))
    assert [path.name for path in files] == [f"step_{i:08d}.safetensors" for i in range(7)]
    assert [Snapshot.load(path).step for path in files] == list(range(7))
    checkpoint = max(tmp_path.rglob("*.ckpt"), key=step_of)
    assert checkpoint.stem == "epoch=0-step=4"
    callback = small(every_n_steps=1)
    keeper = ModelCheckpoint(tmp_path / "resumed", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True, "more_callbacks": [keeper]}
    resumed = fit(callback, tmp_path / "resumed", ckpt_path=str(checkpoint), **options)
    whole = fit(small(every_n_steps=1), tmp_path / "whole")
    assert [snapshot.step for snapshot in saved(resumed)] == [5, 6, 7, 8]
    killed = EventAccumulator(str(folder.parent))
    killed.Reload()
    for tag in CURVES:
        curve = {event.step: event.value for board in (killed, events(resumed)) for event in board.Scalars(tag)}
        assert curve == {event.step: event.value for event in events(whole).Scalars(tag)}


def test_a_checkpoint_loads_with_and_without_the_callback(tmp_path: Path) -> None:
    with_callback = fit(quiet(["rollout"]), tmp_path / "with")
    with_callback.save_checkpoint(tmp_path / "with.ckpt")
    without = fit(None, tmp_path / "without")
    without.save_checkpoint(tmp_path / "without.ckpt")
    assert state_in(tmp_path / "with.ckpt")["fingerprint"]
    with pytest.warns(UserWarning, match="add the following callbacks: .*ViTExplainCallback"):
        resumed = fit(None, tmp_path / "a", max_epochs=3, ckpt_path=str(tmp_path / "with.ckpt"))
    assert resumed.global_step == 12
    resumed = fit(quiet(["rollout"]), tmp_path / "b", max_epochs=3, ckpt_path=str(tmp_path / "without.ckpt"))
    assert [snapshot.step for snapshot in saved(resumed)] == [8, 12]
    module = Classifier.load_from_checkpoint(tmp_path / "with.ckpt", map_location="cpu", weights_only=True)
    trained = with_callback.lightning_module
    assert all(a.equal(b) for a, b in zip(module.parameters(), trained.parameters(), strict=True))
