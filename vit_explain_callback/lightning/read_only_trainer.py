"""Stand in for what a copied step must not reach: trainer, data, loggers, the folder of the run."""

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
# Packages that are told of a run by functions of their own, as `wandb.log`.
_TRACKERS = ("wandb", "mlflow", "comet_ml", "neptune", "clearml", "swanlab", "trackio")


class StandIns:
    """Gives what stands in for the objects around a module.

    Args:
        trainer: Read, never written to.
        module: What it trains.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module = trainer, module
        self._made: StandIn | None = None

    def __call__(self, twin: Twin, value: object) -> object:
        """What stands in for `value` on a twin; None where it is to be copied."""
        if value is self._trainer or is_kind(value, "Trainer"):
            self._made = self._made or StandIn(self._trainer, twin)
            return self._made
        if value is self._module or isinstance(value, Dataset | DataLoader) or is_kind(value, "LightningDataModule"):
            return twin.borrowed(value)
        is_logger = is_kind(value, "Logger") or type(value).__name__ in ("SummaryWriter", "FileWriter", "Run")
        return Silent("") if is_logger else None

    def close(self) -> None:
        """Throw away what was written."""
        if self._made is not None and "folder" in vars(self._made):
            self._made.folder.cleanup()


class StandIn:
    """Answers what a validation step asks of its trainer: numbers, words and the data module, lent.

    What is given to its logger goes nowhere, files go to a folder that is thrown away, it has no optimizers, and to it
    there is one process.
    """

    training = testing = predicting = sanity_checking = False
    validating = evaluating = True
    world_size, global_rank, local_rank, is_global_zero = 1, 0, 0, True

    def __init__(self, trainer: Any, twin: Twin) -> None:
        self._real, self._twin = trainer, twin
        self.callbacks: list[Any] = []
        self.optimizers: list[Any] = []
        self.strategy = _Alone(trainer.world_size)

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """Where the step may write."""
        return tempfile.TemporaryDirectory(prefix="vit_explain_")

    @property
    def log_dir(self) -> str:
        """Path of that folder."""
        return self.folder.name

    default_root_dir = log_dir

    @property
    def logger(self) -> Silent:
        """One that keeps nothing."""
        return Silent(self.log_dir)

    @property
    def loggers(self) -> list[Silent]:
        """The same, in a list."""
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


class Silent:
    """A logger, an experiment or whatever they give: everything can be asked of it and told it, to no effect."""

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


class _Alone:
    """A strategy whose other processes cannot be reached."""

    def __init__(self, processes: int) -> None:
        self._processes = processes

    def all_gather(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        """As of one process: with a dimension more where there are several."""
        return tensor if self._processes == 1 else tensor[None]

    def reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def broadcast(self, value: Any, *_: Any, **__: Any) -> Any:
        return value

    def barrier(self, *_: Any, **__: Any) -> None:
        return None


@contextmanager
def unheard() -> Iterator[None]:
    """What code inside prints, or says to Python's log or to a tracker such as `wandb.log`, goes nowhere."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    said = []
    for module in filter(None, map(sys.modules.get, _TRACKERS)):
        names = [name for name in vars(module) if name.startswith("log") and callable(getattr(module, name))]
        said += [mock.patch.object(module, name, Silent("")) for name in names]
        said += [mock.patch.object(module, "run", Silent(""))] if getattr(module, "run", None) is not None else []
    try:
        for patch in said:
            patch.start()
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for patch in reversed(said):
            patch.stop()
        logging.disable(disabled)
