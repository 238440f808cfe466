"""Stand in for a trainer while a twin of its module runs: it can be asked, but nothing can be done with it."""

from __future__ import annotations

import copy
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SIMPLE = (bool, int, float, str, bytes, type(None), torch.device, Path, Enum)
_GIVEN = {"datamodule", "val_dataloaders", "train_dataloader", "lightning_module"}


class StandIn:
    """Answers what a validation step asks of its trainer: numbers, words and the data module.

    What is given to its logger goes nowhere, files go to a folder that is thrown away, it has no optimizers, and to it
    there is one process.

    Args:
        trainer: Read, never written to.
        folder: Where the step may write.
    """

    training = testing = predicting = sanity_checking = False
    validating = evaluating = True
    world_size, global_rank, local_rank, is_global_zero = 1, 0, 0, True

    def __init__(self, trainer: Any, folder: str) -> None:
        self._real = trainer
        self.log_dir = self.default_root_dir = folder
        self.logger = Silent(folder)
        self.loggers: list[Any] = [self.logger]
        self.callbacks: list[Any] = []
        self.optimizers: list[Any] = []
        self.strategy = _Alone()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._real, name)
        if isinstance(value, _SIMPLE) or name in _GIVEN:
            return value
        if isinstance(value, dict):
            return {key: part.clone() if isinstance(part, Tensor) else part for key, part in value.items()}
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
    """A strategy of one process."""

    def all_gather(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def broadcast(self, value: Any, *_: Any, **__: Any) -> Any:
        return value

    def barrier(self, *_: Any, **__: Any) -> None:
        return None
