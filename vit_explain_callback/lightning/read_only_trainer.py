"""Read-only stand-ins for what a copied step must not reach: trainer, data, loggers, the folder of the run."""

from __future__ import annotations

import copy
import io
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.lightning._compat import is_kind

_SIMPLE = (bool, int, float, str, bytes, type(None), torch.device, Path, Enum)
_LENT = {"datamodule", "val_dataloaders", "train_dataloader", "lightning_module"}
# Packages that log by functions of their own, such as `wandb.log`.
_TRACKERS = ("wandb", "mlflow", "comet_ml", "neptune", "clearml", "swanlab", "trackio")


class StandIns:
    """Replaces the objects around a module when it is copied.

    Args:
        trainer: The trainer, which is read and never written to.
        module: The module that it trains.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module = trainer, module
        self._for_trainer: ReadOnlyTrainer | None = None

    def __call__(self, twin: Twin, value: object) -> object:
        """The stand-in for `value` on a twin; None if it is copied."""
        if value is self._trainer or is_kind(value, "Trainer"):
            self._for_trainer = self._for_trainer or ReadOnlyTrainer(self._trainer, twin)
            return self._for_trainer
        if value is self._module or isinstance(value, Dataset | DataLoader) or is_kind(value, "LightningDataModule"):
            return twin.borrowed(value)
        is_logger = is_kind(value, "Logger") or type(value).__name__ in ("SummaryWriter", "FileWriter", "Run")
        return SilentLogger("") if is_logger else None

    def close(self) -> None:
        """Delete the files that were written."""
        if self._for_trainer is not None and "folder" in vars(self._for_trainer):
            self._for_trainer.folder.cleanup()


class ReadOnlyTrainer:
    """A read-only stand-in for the Trainer: it answers with numbers, strings, and copies of the data module.

    What its logger receives is discarded, files go to a temporary folder, it has no optimizers, and it knows one
    process.
    """

    training = testing = predicting = sanity_checking = False
    validating = evaluating = True
    world_size, global_rank, local_rank, is_global_zero = 1, 0, 0, True

    def __init__(self, trainer: Any, twin: Twin) -> None:
        self._real, self._twin = trainer, twin
        self.callbacks: list[Any] = []
        self.optimizers: list[Any] = []
        self.strategy = _SingleProcess(trainer.world_size)

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """A temporary folder that the step may write to."""
        return tempfile.TemporaryDirectory(prefix="vit_explain_")

    @property
    def log_dir(self) -> str:
        """Path of the temporary folder."""
        return self.folder.name

    default_root_dir = log_dir

    @property
    def logger(self) -> SilentLogger:
        """A logger that discards everything."""
        return SilentLogger(self.log_dir)

    @property
    def loggers(self) -> list[SilentLogger]:
        """That logger, in a list."""
        return [self.logger]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._real, name)
        if isinstance(value, _SIMPLE):
            return value
        if name in _LENT:
            return self._twin.copy(value)
        if isinstance(value, dict):
            return {key: part.clone() if isinstance(part, Tensor) else part for key, part in value.items()}
        if isinstance(value, list | tuple) and all(isinstance(part, _SIMPLE) for part in value):
            return type(value)(value)
        if name == "state":
            return copy.copy(value)
        raise AttributeError(f"`trainer.{name}` cannot be used while the model is explained")


class SilentLogger:
    """A logger, an experiment or any part of them: every attribute and call exists and has no effect."""

    def __init__(self, folder: str) -> None:
        self.log_dir = self.save_dir = self.root_dir = folder
        self.name, self.version = "explained", 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:  # noqa: D102
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class _SingleProcess:
    """A strategy that cannot reach other processes."""

    def __init__(self, processes: int) -> None:
        self._processes = processes

    def all_gather(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        """The tensor of one process, with a leading dimension if there are several."""
        return tensor if self._processes == 1 else tensor[None]

    def reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def broadcast(self, value: Any, *_: Any, **__: Any) -> Any:
        return value

    def barrier(self, *_: Any, **__: Any) -> None:
        return None


@contextmanager
def silenced() -> Iterator[None]:
    """Discard what code inside prints, or logs with Python's logging or a tracker such as `wandb.log`."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    patches = []
    for module in filter(None, map(sys.modules.get, _TRACKERS)):
        names = [name for name in vars(module) if name.startswith("log") and callable(getattr(module, name))]
        patches += [mock.patch.object(module, name, SilentLogger("")) for name in names]
        patches += (
            [mock.patch.object(module, "run", SilentLogger(""))] if getattr(module, "run", None) is not None else []
        )
    try:
        for patch in patches:
            patch.start()
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for patch in reversed(patches):
            patch.stop()
        logging.disable(disabled)
