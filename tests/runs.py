"""Short training runs that the tests look at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.models import CLASSES, random_images, tiny_vit
from vit_explain_callback import Checks, Detail, ViTExplainCallback
from vit_explain_callback.tracking.snapshot import Snapshot


class Pictures(Dataset[Any]):
    """`length` random images of 4 x 4 colours with labels, as pairs or as mappings."""

    def __init__(self, length: int = 16, keys: tuple[str, str] | None = None) -> None:
        self.images = random_images(length, (4, 4), seed=7).repeat_interleave(8, 2).repeat_interleave(8, 3)
        self.labels = torch.arange(length) % CLASSES
        self.keys = keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        item = (self.images[index], int(self.labels[index]))
        return item if self.keys is None else dict(zip(self.keys, item, strict=True))


class Classifier(pl.LightningModule):
    def __init__(self, vit: Any = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = tiny_vit() if vit is None else vit
        self.lr = lr

    def forward(self, images: Tensor) -> Any:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch if isinstance(batch, list) else batch.values()
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def loader(data: Dataset[Any] | None = None, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(Pictures() if data is None else data, batch_size)


def fit(
    callback: ViTExplainCallback | None,
    folder: Path | str,
    module: pl.LightningModule | None = None,
    validation: Any = "same",
    train: Any = None,
    ckpt_path: str | None = None,
    more_callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> pl.Trainer:
    """A run of 2 epochs of 4 steps on the CPU with TensorBoard."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": TensorBoardLogger(str(folder)),
        "default_root_dir": str(folder),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "callbacks": [*([] if callback is None else [callback]), *more_callbacks],
    }
    trainer = pl.Trainer(**(defaults | options))
    module = Classifier() if module is None else module
    validation = loader() if isinstance(validation, str) else validation
    if isinstance(train, pl.LightningDataModule):
        trainer.fit(module.train(), datamodule=train, ckpt_path=ckpt_path)
    else:
        trainer.fit(module.train(), loader() if train is None else train, validation, ckpt_path=ckpt_path)
    return trainer


def events(trainer: pl.Trainer, folder: str | None = None) -> EventAccumulator:
    accumulator = EventAccumulator(folder or trainer.log_dir)
    accumulator.Reload()
    return accumulator


def saved(trainer: pl.Trainer) -> list[Snapshot]:
    return [Snapshot.load(path) for path in sorted(Path(trainer.log_dir or "").glob("explanations/step_*.safetensors"))]


QUIET: dict[str, Any] = {"checks": None, "num_shown": 1, "detail": Detail(block_statistics=False, page=False)}
"""Options of the callback that leave out what takes most of a short run's time."""


def quiet(*methods: Any, **options: Any) -> ViTExplainCallback:
    """The callback for tests that look at no picture, page, check or statistics of blocks, or at those they ask for.

    Args:
        *methods: As the callback takes them.
        **options: Likewise, and those of `Checks` and `Detail` by their own names.
    """

    def of(group: type[Checks] | type[Detail]) -> dict[str, Any]:
        return {name: options.pop(name) for name in group.__annotations__ if name in options}

    checks, detail = of(Checks), of(Detail)
    if isinstance(options.get("detail", ""), str):
        level = options.pop("detail", "brief")
        options["detail"] = {"level": level, "block_statistics": False, "page": False} | detail
    return ViTExplainCallback(*methods, **QUIET | ({"checks": checks} if checks else {}) | options)


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "ViTExplainCallback" in str(w.message)]
