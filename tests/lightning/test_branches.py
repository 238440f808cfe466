"""Branches of a run from one checkpoint, and fits of one trainer: no snapshot twice, no branch in another's files."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from tests.lightning.test_loggers import Spy
from tests.models import random_images, tiny_vit
from tests.runs import Classifier, Pictures, events, fit, loader, messages, quiet
from vit_explain_callback import Explainer, ExplanationTracker, Probe, ViTExplainCallback, load_run
from vit_explain_callback.tracking.run_folder import RunFolder
from vit_explain_callback.tracking.snapshot import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*no logger of this run shows pictures")


def small(**options: Any) -> ViTExplainCallback:
    options = {"num_images": 2, "num_shown": 1, "checks": None} | options
    return quiet(["rollout"], **options)


def loggers(kind: str, folder: Path) -> Any:
    return {
        "none": lambda: False,
        "tensorboard": lambda: TensorBoardLogger(folder, name="", version="one"),
        "csv": lambda: CSVLogger(folder, name="", version="one"),
        "of its own": Spy,
    }[kind]()


def run(folder: Path, kind: str, epochs: int, ckpt: Path | None = None, shift: int = 0) -> tuple[list[Path], list[str]]:
    """Fit on labels of one's own, with a checkpoint after each epoch; the checkpoints, and what is said of branches."""
    where, data = folder / f"checkpoints-{shift}-{epochs}", Pictures()
    data.labels = (data.labels + shift) % 5
    keeper = ModelCheckpoint(where, filename="{epoch}", save_top_k=-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options: dict[str, Any] = {"enable_checkpointing": True, "more_callbacks": [keeper], "max_epochs": epochs}
        ckpt_path = None if ckpt is None else str(ckpt)
        fit(small(), folder, train=loader(data), ckpt_path=ckpt_path, logger=loggers(kind, folder), **options)
    return sorted(where.iterdir()), [text for text in messages(caught) if "another branch" in text]


def branches(folder: Path) -> dict[str, list[int]]:
    found = {path.parent for path in folder.rglob("probe.safetensors")}
    return {path.name: load_run(path).steps for path in sorted(found)}


def contents(folder: Path) -> dict[Path, bytes]:
    (place,) = {path.parent for path in folder.rglob("probe.safetensors") if path.parent.name == "explanations"}
    return {path: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize("kind", ["none", "tensorboard", "csv", "of its own"])
def test_a_branch_from_a_checkpoint_has_a_folder_of_its_own(tmp_path: Path, kind: str) -> None:
    checkpoints, said = run(tmp_path, kind, 4)
    assert said == []
    assert branches(tmp_path) == {"explanations": [0, 4, 8, 12, 16]}
    before = contents(tmp_path)
    _, said = run(tmp_path, kind, 3, checkpoints[1], shift=1)
    (only,) = said
    assert re.search(
        r"holds snapshots up to step 16 of another branch .* resumed at step 8; .*explanations_1, with", only
    )
    assert contents(tmp_path) == before
    assert branches(tmp_path) == {"explanations": [0, 4, 8, 12, 16], "explanations_1": [0, 4, 8, 12]}
    one, other = (load_run(next(tmp_path.rglob(name))) for name in ("explanations", "explanations_1"))
    for step, (first, second) in enumerate(zip(one.maps["rollout"], other.maps["rollout"], strict=False)):
        assert first.equal(second) == (step < 3)
    assert [row["step"] for row in other.scalars] == [0, 4, 8, 12]
    assert not list(tmp_path.rglob("*.partial"))


def test_two_runs_that_resume_one_checkpoint_alternately(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "none", 2)
    (b, said_b), (c, said_c) = run(tmp_path, "none", 3, first[1], 1), run(tmp_path, "none", 3, first[1], 2)
    assert (len(said_b), len(said_c)) == (0, 1)
    b, said_b = run(tmp_path, "none", 4, b[-1], 1)
    c, said_c = run(tmp_path, "none", 4, c[-1], 2)
    assert said_b == said_c == []
    run(tmp_path, "none", 5, b[-1], 1)
    c, _ = run(tmp_path, "none", 5, c[-1], 2)
    steps = [0, 4, 8, 12, 16, 20]
    assert branches(tmp_path) == {"explanations": steps, "explanations_1": steps}
    one, other = (load_run(tmp_path / name).maps["rollout"] for name in ("explanations", "explanations_1"))
    assert one[:3].equal(other[:3])
    assert not any(a.equal(b) for a, b in zip(one[3:], other[3:], strict=True))
    run(tmp_path, "none", 5, tmp_path / "checkpoints-2-4" / c[-1].name.replace("4", "3"), 3)  # a branch of the branch
    assert branches(tmp_path)["explanations_2"] == steps
    assert "explanations_3" not in branches(tmp_path)


def test_a_run_that_goes_on_from_its_last_checkpoint_is_no_branch(tmp_path: Path) -> None:
    checkpoints, _ = run(tmp_path, "none", 2)
    for epochs in (3, 4):
        checkpoints, said = run(tmp_path, "none", epochs, checkpoints[-1])
        assert said == []
    assert branches(tmp_path) == {"explanations": [0, 4, 8, 12, 16]}


def tracker(folder: Path, model: nn.Module | None = None) -> ExplanationTracker:
    probe = Probe.of(random_images(2))
    return ExplanationTracker(Explainer(model or tiny_vit(), ["rollout"]), probe, folder=folder, checks=None)


def test_branches_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    first = tracker(tmp_path / "a")
    first.observe(0)
    first.observe(5)
    state = first.state_dict()
    first.observe(7)
    again = tracker(tmp_path / "a", tiny_vit(seed=3))
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="up to step 7 of another branch of this run, which is resumed at step 5"):
        again.observe(6)
    assert branches(tmp_path) == {"a": [0, 5, 7], "a_1": [0, 5, 6]}
    third = tracker(tmp_path / "a")
    third.load_state_dict(again.state_dict())
    third.observe(9)
    assert branches(tmp_path) == {"a": [0, 5, 7], "a_1": [0, 5, 6, 9]}
    same = tracker(tmp_path / "a")
    same.load_state_dict(state, step=7)  # at which the checkpoint was written, before its snapshot
    same.observe(7)
    assert branches(tmp_path)["a"] == [0, 5, 7]


def test_a_branch_whose_copies_fail_is_tried_again_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tracker(tmp_path / "a")
    first.observe(0)
    state = first.state_dict()
    first.observe(7)
    folder = RunFolder(tmp_path / "a")
    folder.resume(state["run"], 0)

    def full(*_: Any) -> None:
        raise OSError("full")

    with monkeypatch.context() as context:
        context.setattr("vit_explain_callback.tracking.run_folder.shutil.copyfile", full)
        for _ in range(2):
            with pytest.raises(OSError, match="full"):
                _ = folder.path
    with pytest.warns(UserWarning, match="another branch"):
        assert folder.path.name == "a_1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a_1"]
    assert Snapshot.load(folder.path / "step_00000000.safetensors").step == 0


def tags_twice(trainer: Any) -> list[Any]:
    """Tags of ours with two values at one step."""
    board, twice = events(trainer), []
    for kind in ("scalars", "images", "tensors"):
        for tag in board.Tags()[kind]:
            if tag.startswith("explain/"):
                found = {"scalars": board.Scalars, "images": board.Images, "tensors": board.Tensors}[kind](tag)
                twice += [(tag, step) for step, n in Counter(event.step for event in found).items() if n > 1]
    return twice


@pytest.mark.parametrize("schedule", [{}, {"every_n_steps": 3}, {"every_n_epochs": 2}, {"checks": 1}])
def test_fitting_on_with_one_trainer_goes_on_with_the_run(tmp_path: Path, schedule: dict[str, Any]) -> None:
    callback, module = small(**schedule), Classifier()
    trainer = fit(callback, tmp_path, module)
    baseline = callback.tracker.history.baseline  # type: ignore[union-attr]
    for _ in range(2):
        trainer.fit_loop.max_epochs += 1  # type: ignore[operator]
        trainer.fit(module, loader(), loader())
    trainer.logger.experiment.flush()  # type: ignore[union-attr]
    assert [entry for entry in tags_twice(trainer) if "filmstrip" not in entry[0]] == []
    assert trainer.global_step == 16
    history = callback.tracker.history  # type: ignore[union-attr]
    assert history.baseline.maps["rollout"].equal(baseline.maps["rollout"])
    steps = [one.step for one in history.snapshots]
    assert steps == sorted(set(steps))
    assert steps[-1] == 16
    assert branches(tmp_path) == {"explanations": steps}
    curve = [event.step for event in events(trainer).Scalars("explain/drift/baseline_rank_correlation/rollout")]
    assert curve == steps


@pytest.mark.parametrize("change", ["validation data", "module"])
def test_fitting_on_with_something_else_begins_anew_but_logs_no_step_twice(tmp_path: Path, change: str) -> None:
    callback, module = small(), Classifier()
    trainer = fit(callback, tmp_path, module)
    other = Pictures()
    other.images = other.images.flip(0) if change == "validation data" else other.images
    trainer.fit_loop.max_epochs += 1  # type: ignore[operator]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        trainer.fit(module if change == "validation data" else Classifier(), loader(), loader(other))
    assert [entry for entry in tags_twice(trainer) if "filmstrip" not in entry[0]] == []
    history = callback.tracker.history  # type: ignore[union-attr]
    assert history.baseline.step == 8
    assert branches(tmp_path) == {"explanations": [0, 4, 8], "explanations_1": [8, trainer.global_step]}


def test_another_trainer_begins_anew(tmp_path: Path) -> None:
    callback, module = small(), Classifier()
    fit(callback, tmp_path / "a", module)
    fit(callback, tmp_path / "b", module)
    assert [one.step for one in callback.tracker.history.snapshots] == [0, 4, 8]  # type: ignore[union-attr]
    assert branches(tmp_path / "b") == {"explanations": [0, 4, 8]}


class Filtered(Classifier):
    """Leaves unlabelled images out of what it validates."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        known = labels < 3
        nn.functional.cross_entropy(self(images[known]), labels[known])


class TwoSizes(Pictures):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return (image, label) if index % 4 else (torch.zeros(3, 48, 48), label)


@pytest.mark.parametrize(
    ("module", "data", "said"),
    [
        (Classifier, Pictures(7), "the validation set gave 7"),
        (Filtered, Pictures(16), r"only \d+ of the 16 validation images can be explained: those of one size"),
        (Classifier, TwoSizes(20), "only 15 of the 20 validation images can be explained: those of one size"),
    ],
)
def test_what_was_given_and_what_is_left_are_told_apart(tmp_path: Path, module: Any, data: Any, said: str) -> None:
    options: dict[str, Any] = {"check_val_every_n_epoch": 9, "max_epochs": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(small(num_images=16), tmp_path, module(), loader(data), **options)
    assert [text for text in messages(caught) if re.search(rf"`num_images=16`, but {said}", text)], messages(caught)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("what", ["folder", "parent", "dangling", "file", "gone"])
def test_a_folder_that_is_swapped_in_mid_run_is_not_written_through(tmp_path: Path, what: str) -> None:
    victim = tmp_path / "victim" / "explanations"
    victim.mkdir(parents=True)
    (victim / "precious").write_text("as it was", encoding="utf-8")

    class Swaps(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step != 3:
                return
            folder = tmp_path / "run" / "explanations"
            if what == "parent":
                os.rename(folder.parent, tmp_path / "moved")
                folder.parent.symlink_to(victim.parent)
                return
            os.rename(folder, tmp_path / "moved")
            if what == "file":
                folder.write_text("in the way", encoding="utf-8")
            elif what != "gone":
                folder.symlink_to(victim if what == "folder" else tmp_path / "nowhere")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(small(), tmp_path / "run", Swaps(), logger=False)
    assert trainer.global_step == 8
    assert [path.name for path in victim.iterdir()] == ["precious"]
    assert not (tmp_path / "nowhere").exists()
    assert len([text for text in messages(caught) if "cannot write to the folder" in text]) == 1
