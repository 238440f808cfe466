"""The usual parts of a project: a LightningModule around a tiny ViT, and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.models import CLASSES, tiny_vit

COUNT = 20
LABELS = [index % CLASSES for index in range(COUNT)]


class Project(pl.LightningModule):
    """A classifier whose training and validation share one step."""

    def __init__(self, **vit: Any) -> None:
        super().__init__()
        self.vit = tiny_vit(**vit).train()

    def forward(self, images: Tensor) -> Any:
        return self.vit(images)

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


class Samples(Dataset[Any]):
    """Images and labels as tuples, or in another form that `form(index, image, label)` gives them."""

    def __init__(self, images: Any, labels: Any, form: Callable[[int, Any, Any], Any] | None = None) -> None:
        self.images, self.labels, self.form = images, labels, form

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], self.labels[index]
        return (image, label) if self.form is None else self.form(index, image, label)


def pictures(seed: int = 5, count: int = COUNT, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def loader(
    images: Any = None,
    labels: Any = LABELS,
    form: Callable[[int, Any, Any], Any] | None = None,
    batch_size: int = 5,
    **options: Any,
) -> DataLoader[Any]:
    return DataLoader(Samples(pictures() if images is None else images, labels, form), batch_size, **options)


def training(**options: Any) -> DataLoader[Any]:
    """Two batches of other images than those of validation."""
    return loader(pictures(seed=6, count=10), **options)
