"""Where the model is made, and how a step calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn

from tests.models import CLASSES, randomised, tiny_vit
from tests.optional import optional
from tests.situations.check import check
from tests.situations.project import Project, loader
from tests.situations.situation import NO_THREAD, RIGHT, Situation

transformers = optional("transformers")

cross_entropy = nn.functional.cross_entropy


class BuiltInSetup(Project):
    def __init__(self) -> None:
        super().__init__()
        del self.vit

    def setup(self, stage: str) -> None:
        self.vit = tiny_vit(num_classes=CLASSES).train()


class BuiltInConfigureModel(Project):
    def __init__(self) -> None:
        super().__init__()
        del self.vit

    def configure_model(self) -> None:
        if not hasattr(self, "vit"):
            self.vit = tiny_vit(num_classes=CLASSES).train()

    def setup(self, stage: str) -> None:
        if self._trainer is None:  # the check's reference
            self.configure_model()


class ForwardWithLabels(Project):
    def forward(self, images: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = self.vit(images)
        return cross_entropy(logits, labels), logits

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self(*batch)[0]
        return loss


class KeywordOnly(Project):
    def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = self.vit(pixel_values)
        return {"logits": logits, "loss": None if labels is None else cross_entropy(logits, labels)}

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self(pixel_values=batch[0], labels=batch[1])["loss"]
        return loss


class WholeBatch(Project):
    def forward(self, batch: Any) -> Any:
        return self.vit(batch["image"])

    def step(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch), batch["label"])


class NoForward(Project):
    """Everything stands in the steps."""

    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        return cross_entropy(self.vit(batch[0]), batch[1])


class OwnNames(Project):
    """Calls the arguments of its steps what it likes, as Lightning gives them by their place."""

    def training_step(self, data: Any, i: int) -> Tensor:  # type: ignore[override]
        return self.step(data)

    def validation_step(self, data: Any, i: int, which: int = 0) -> None:  # type: ignore[override]
        assert (i >= 0, which) == (True, 0)
        self.log("val_loss", self.step(data), batch_size=1)


class StarArguments(Project):
    """Takes whatever comes."""

    def validation_step(self, *args: Any) -> None:
        batch, index = args
        assert index >= 0
        self.log("val_loss", self.step(batch), batch_size=1)


class LookingAround(Project):
    """The step asks the trainer and writes to the logger."""

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        if self.trainer.sanity_checking or self.current_epoch > 3 or self.global_step > 100:
            images = images + 0
        self.logger.experiment.add_scalar("own", images.mean(), self.global_step)  # type: ignore[union-attr]
        return cross_entropy(self.vit(images), labels) / self.trainer.accumulate_grad_batches


class OtherForward(Project):
    """`forward` is for export: probabilities at another temperature."""

    def forward(self, images: Tensor) -> Any:
        return (self.vit(images) / 4).softmax(dim=1)

    def step(self, batch: Any) -> Tensor:
        return cross_entropy(self.vit(batch[0]), batch[1])


class MixingMetricOnly(Project):
    """Training mixes the images of a batch, and validation computes no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        order = torch.randperm(len(images))
        logits = self(0.4 * images + 0.6 * images[order])
        return 0.6 * cross_entropy(logits, labels[order]) + 0.4 * cross_entropy(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean(), batch_size=1)


class MetricOnly(Project):
    """Validation computes an accuracy and no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.vit(images), labels)
        self.log("val_acc", self.accuracy, batch_size=5)


class LossByHand(Project):
    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        return -self(images).log_softmax(dim=1).gather(1, labels[:, None]).mean()


class HuggingFace(Project):
    """The model computes its loss itself, and the batch goes in as keywords."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
        configuration: Any = transformers.ViTConfig
        config = configuration(**sizes, image_size=32, patch_size=8, num_labels=CLASSES)
        self.vit = randomised(transformers.ViTForImageClassification(config), seed=0)

    def forward(self, **batch: Tensor) -> Any:  # type: ignore[override]
        return self.vit(**batch)

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss


SITUATIONS = {
    "model built in setup": Situation("lightning#5410", "stopped: no ViT in the module yet", BuiltInSetup),
    "model built in configure_model": Situation("lightning#5410", RIGHT, BuiltInConfigureModel),
    "forward with required labels": Situation(NO_THREAD, "stopped: `labels` is missing", ForwardWithLabels),
    "forward with keyword-only arguments": Situation(NO_THREAD, "stopped: takes no position", KeywordOnly),
    "forward of a whole batch": Situation(
        NO_THREAD,
        "every snapshot failed: a tensor is no batch",
        WholeBatch,
        validation=lambda: loader(form=lambda _, image, label: {"image": image, "label": label}),
    ),
    "no forward, all in the steps": Situation(NO_THREAD, RIGHT, NoForward),
    "steps with arguments of other names": Situation(NO_THREAD, RIGHT, OwnNames),
    "a step of star arguments": Situation(NO_THREAD, RIGHT, StarArguments),
    "forward for export differs from the step": Situation(
        NO_THREAD, "explained forward's output, not what is trained", OtherForward, says="forward"
    ),
    "a step that looks at trainer and logger": Situation(NO_THREAD, RIGHT, LookingAround),
    "validation computes no loss": Situation(NO_THREAD, RIGHT, MetricOnly),
    "validation computes no loss, training mixes images": Situation(
        NO_THREAD, "explained mixed images, with the labels of others", MixingMetricOnly
    ),
    "a loss written by hand": Situation(NO_THREAD, RIGHT, LossByHand),
    "Hugging Face, batch as keywords": Situation(
        NO_THREAD,
        "stopped: takes no position",
        HuggingFace,
        validation=lambda: loader(form=lambda _, image, label: {"pixel_values": image, "labels": label}),
        logits=lambda module, fed: module.vit(fed).logits,
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_model_is_called_as_the_step_calls_it(name: str, tmp_path: Path) -> None:
    check(SITUATIONS[name], tmp_path)
