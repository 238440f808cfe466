"""An error of the user's own code does not end training for us, and nothing of the user's is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from tests.laws.user_project import NAMED, Case, check, leave
from tests.models import CLASSES
from tests.runs import fit, quiet
from tests.situations.project import LABELS, Project, loader, training
from vit_explain_callback import Detail, ViTExplainCallback

NO_THREAD, RIGHT = "no thread", "right, and must stay so"


class WarmingUp(Project):
    """Refuses to be evaluated before it has been trained."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.vit.register_forward_pre_hook(self.warm)

    def warm(self, vit: nn.Module, _: Any) -> None:
        if vit.training:
            self.steps += 1
        elif self.steps == 0:
            raise ValueError("the prototypes are not there yet")


class OpenSet(Project):
    """Validation holds classes that training does not know; no loss is computed of them."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        known = labels < CLASSES
        self.log("known", (self(images).argmax(dim=1) == labels)[known].float().mean(), batch_size=5)


class OwnAccuracy(Project):
    """Logs metrics under the names that the callback's once had."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(dim=1) == labels).float().mean()
        for name in ("probe/accuracy", "drift_baseline/rollout/spearman", "final/drift/rollout"):
            self.log(name, accuracy, batch_size=5)


class WithMeta(Tensor):
    """Images that carry their file's header along, as MONAI's MetaTensor does."""

    meta: dict[str, Any]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(function, types, args, kwargs)
        if isinstance(found, cls) and not hasattr(found, "meta"):
            found.meta = {"affine": "identity"}
        return found


def with_meta(_: int, image: Tensor, label: int) -> Any:
    return image.as_subclass(WithMeta), torch.tensor(label).as_subclass(WithMeta)


class Medical(Project):
    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        assert isinstance(images, WithMeta)
        return nn.functional.cross_entropy(self(images), labels).as_subclass(Tensor)


class Strict(TensorBoardLogger):
    """A logger that takes the metrics it knows, and no others."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if unknown := set(metrics) - {"val_loss", "epoch"}:
            raise ValueError(f"unknown metrics: {sorted(unknown)}")
        super().log_metrics(metrics, step)


CASES = {
    "the model raises at the baseline": Case(NO_THREAD, "stopped before it began", WarmingUp, warned=(1,), snapshots=2),
    "labels of unknown classes": Case(
        NO_THREAD,
        "stopped before it began",
        OpenSet,
        lambda: (training(), loader(labels=[label + index // 10 for index, label in enumerate(LABELS)])),
        warned=(0, 1),
        snapshots=0,
    ),
    "metrics of the user's under our old names": Case(NO_THREAD, "overwritten", OwnAccuracy),
    "batches of a subclass of Tensor": Case(
        "MONAI#8355",
        "the checkpoint did not load again",
        Medical,
        lambda: (training(form=with_meta), loader(form=with_meta)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_without(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


def test_a_logger_that_refuses_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.runs.TensorBoardLogger", Strict)
    check(Case(NO_THREAD, RIGHT, warned=(1,)), tmp_path)


def test_the_best_checkpoint_is_that_of_the_users_metric(tmp_path: Path) -> None:
    def best(callbacks: list[pl.Callback], folder: Path) -> Any:
        keep = pl.callbacks.ModelCheckpoint(folder, monitor="probe/accuracy", mode="max")
        options: dict[str, Any] = {"enable_checkpointing": True}
        fit(None, folder, OwnAccuracy(), loader(), training(), more_callbacks=[*callbacks, keep], **options)
        return keep.best_model_score

    assert best([], tmp_path / "without").equal(best([quiet()], tmp_path / "with"))


def test_what_is_ours_stands_under_one_prefix(tmp_path: Path) -> None:
    """So that no name of the user's can be taken."""
    without = leave(Case(NO_THREAD, "names such as `probe/accuracy`"), tmp_path / "without", []).everything
    found = leave(
        Case(NO_THREAD, "as above"), tmp_path / "with", [ViTExplainCallback(detail=Detail(page=False), num_shown=1)]
    ).everything
    for part in NAMED:
        ours = found[part].keys() - without[part].keys()
        assert [name for name in ours if not name.startswith("explain/")] == []
