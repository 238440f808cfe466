"""Projects whose step alone has the logits: it is run on a copy, and reaches nothing."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from tests.models import CLASSES
from tests.runs import fit, quiet
from tests.situations.project import Project, loader, pictures
from vit_explain_callback import ViTExplainCallback

FIT = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2, "num_sanity_val_steps": 2}


def trained(callback: Any, folder: Path, module: Any, validation: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    given = loader() if validation is None else validation
    return fit(callback, folder, module, given, loader(pictures(6), collate_fn=given.collate_fn), **FIT | options)


def same_as_without(module: Any, folder: Path, callback: ViTExplainCallback, **options: Any) -> Any:
    """Train without and with; give back the module, whose weights are the same."""
    states = []
    for one in (None, callback):
        torch.manual_seed(0)
        made = module()
        trained(one, folder / str(one is None), made, **options)
        states.append(made.state_dict())
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
    return made


def check_logits(callback: ViTExplainCallback, logits: Any) -> None:
    assert callback.tracker is not None
    with torch.no_grad():
        expected = logits(callback.tracker.probe.images)
    torch.testing.assert_close(callback.tracker.history.now.logits, expected, rtol=1e-4, atol=1e-5)


class Prompted(Project):
    """Sixteen prompts of sixteen classes come with every batch, beside sixteen images."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.text = nn.Embedding(40, 48)

    def forward(self, images: Tensor, prompts: Tensor) -> Any:  # type: ignore[override]
        return 5 * F.normalize(self.vit(images), dim=1) @ F.normalize(self.text(prompts).mean(1), dim=1).T

    def step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["image"], batch["prompts"]), batch["label"])


PROMPTS = torch.arange(32).view(16, 2)


def prompted(items: list[Any]) -> Any:
    images, labels = default_collate(items)
    return {"image": images, "prompts": PROMPTS, "label": labels}


@pytest.mark.parametrize("sanity", [0, 1])
def test_what_has_as_many_rows_as_images_need_not_belong_to_them(sanity: int, tmp_path: Path) -> None:
    callback = quiet(num_images=16, batch_size=6)
    validation = loader(pictures(count=32), [i % 16 for i in range(32)], batch_size=16, collate_fn=prompted)
    module = same_as_without(Prompted, tmp_path, callback, validation=validation, num_sanity_val_steps=sanity)
    check_logits(callback, lambda images: module.eval()(images, PROMPTS))
    assert callback.tracker is not None
    assert len(callback.tracker.probe) == 16


class Gathering(Project):
    """Gathers from all processes, in the form that several give."""

    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        logits: Any = self.all_gather(self.vit(images) * 2)
        logits = logits.flatten(0, 1) if logits.ndim == 3 else logits
        return F.cross_entropy(logits, labels)


def test_what_is_gathered_has_the_form_that_it_has_in_the_run() -> None:
    """With several processes, a dimension of them comes first."""
    from vit_explain_callback.lightning.read_only_trainer import _SingleProcess

    logits = torch.randn(4, 5)
    assert _SingleProcess(1).all_gather(logits).shape == (4, 5)
    assert _SingleProcess(3).all_gather(logits).flatten(0, 1).equal(logits)


def test_a_step_that_gathers_is_explained(tmp_path: Path) -> None:
    callback = quiet(num_images=5)
    module = same_as_without(Gathering, tmp_path, callback)
    check_logits(callback, lambda images: 2 * module.eval().vit(images))


class Distilled(Project):
    """timm's distilled DeiT: two outputs in training, one in evaluation; validation only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_classes=CLASSES
        )
        self.vit.set_distilled_training(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        logits, distilled = self.vit(images)
        return F.cross_entropy(logits, labels) + F.cross_entropy(distilled, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.vit(images).argmax(1) == labels).float().mean(), batch_size=1)


@pytest.mark.filterwarnings("ignore:ViTExplainCallback. `training_step` computes 2 losses")
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_training_step_alone_shows_the_loss(sanity: int, tmp_path: Path) -> None:
    callback = quiet(num_images=5)
    module = same_as_without(Distilled, tmp_path, callback, num_sanity_val_steps=sanity)
    check_logits(callback, lambda images: module.eval().vit(images))
    assert callback.tracker is not None
    assert callback.tracker.probe.labels is not None


class Telling(Project):
    """Tells the world about each step, by everything that is at hand."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)
        self.seen: list[int] = []

    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        import wandb

        tracker: Any = wandb
        trainer: Any = self.trainer
        images, labels = batch
        loss = F.cross_entropy(self.head(self.vit(images)[:, :48] * 1.0), labels)
        self.seen.append(len(labels))
        wandb.log({"loss": loss.item()})
        tracker.run.log({"loss": loss.item()})
        logging.getLogger("theirs").warning("a step")
        print("a step")
        assert trainer.datamodule is None
        trainer.logger.experiment.add_scalar("x", 1.0, 0)
        assert len(trainer.val_dataloaders.dataset) == 20
        return loss


def test_a_step_that_is_run_on_a_copy_tells_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[Any] = []
    fake = types.ModuleType("wandb")
    fake.log = told.append  # type: ignore[attr-defined]
    fake.run = types.SimpleNamespace(log=told.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    counts = []
    for callback in (None, quiet(num_images=5)):
        told.clear()
        caplog.clear()
        capsys.readouterr()
        torch.manual_seed(0)
        module = Telling()
        trained(callback, tmp_path / str(callback is None), module)
        said = capsys.readouterr().out.count("a step")
        counts.append((len(told), len([one for one in caplog.records if one.name == "theirs"]), said, module.seen))
    assert counts[0] == counts[1]
    assert fake.log == told.append  # type: ignore[attr-defined]
    assert callback is not None
    check_logits(callback, lambda images: module.eval().head(module.vit(images)))
