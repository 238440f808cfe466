"""Data sets whose file, like HDF5, is open in one process only; without Lightning and timm, for spawned workers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset


class File:
    """An open file: it cannot go to another process, nor be copied."""

    def __init__(self) -> None:
        self.images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(5))

    def __reduce__(self) -> NoReturn:
        raise TypeError("h5py objects cannot be pickled")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("h5py objects cannot be copied")


class OpenedAtFirstUse(Dataset[Any]):
    """Opens its file in the first `__getitem__`."""

    def __init__(self) -> None:
        self.file: File | None = None

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.file is None:
            self.file = File()
        return self.file.images[index], index % 5
