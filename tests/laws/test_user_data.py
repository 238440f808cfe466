"""The user's data are read by training and validation alone: nothing is opened, drawn, counted or read on for us."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from tests.laws.files import OpenedAtFirstUse
from tests.laws.user_project import Case, check
from tests.models import CLASSES
from tests.situations.project import COUNT, LABELS, Project, Samples, loader, pictures, training

NO_THREAD = "no thread"


class Recording(Project):
    """Keeps what training and validation are given, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        self.given.append((self.training, images.flatten(1)[:, 0].clone(), labels.clone()))
        return nn.functional.cross_entropy(self(images), labels)


class Dali(Recording):
    """Batches as NVIDIA DALI gives them."""

    def step(self, batch: Any) -> Tensor:
        return super().step((batch[0]["data"], batch[0]["label"]))


class Augmented(Dataset[Any]):
    """Noise out of generators that the data set owns; counts what is read."""

    def __init__(self) -> None:
        self.images = pictures()
        self.torch_stream = torch.Generator().manual_seed(3)
        self.python_stream, self.numpy_stream = random.Random(3), np.random.default_rng(3)
        self.read: list[int] = []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        noise = torch.randn((3, 32, 32), generator=self.torch_stream) * self.python_stream.random()
        return self.images[index] + noise + float(self.numpy_stream.random()), LABELS[index]


class ReadingOn(IterableDataset[Any]):
    """A stream with one place: every pass begins where the last one ended."""

    def __init__(self) -> None:
        self.images, self.place = pictures(count=100), 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(10):
            yield self.images[self.place % 100], self.place % CLASSES
            self.place += 1


class OpenedStream(IterableDataset[Any]):
    """A stream out of one iterator, which cannot be copied."""

    def __init__(self) -> None:
        self.stream = ((image, index % CLASSES) for index, image in enumerate(pictures(count=100)))

    def __iter__(self) -> Iterator[Any]:
        for _ in range(10):
            yield next(self.stream)


class CountingEpochs(IterableDataset[Any]):
    """Shuffles by the number of the epoch, which it counts itself."""

    def __init__(self) -> None:
        self.images, self.epoch = pictures(), 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for index in torch.randperm(COUNT, generator=torch.Generator().manual_seed(self.epoch)).tolist():
            yield self.images[index], LABELS[index]


class OwnIterator:
    """A pipeline that is its own iterator, as DALI's; it begins anew after its end, and keeps count."""

    def __init__(self) -> None:
        self.images, self.place, self.passes = pictures(), 0, 0

    def __iter__(self) -> OwnIterator:
        return self

    def __len__(self) -> int:
        return 4

    def __next__(self) -> Any:
        if self.place == COUNT:
            self.place = 0
            self.passes += 1
            raise StopIteration
        chosen = slice(self.place, self.place + 5)
        self.place += 5
        return [{"data": self.images[chosen], "label": torch.tensor(LABELS[chosen])}]


class OwnLoaders(Recording):
    """Loaders made by the module, which counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def val_dataloader(self) -> Any:
        self.asked += 1
        generator = torch.Generator().manual_seed(self.asked)
        return DataLoader(Samples(pictures(), LABELS), 5, sampler=RandomSampler(LABELS, generator=generator))


def in_dicts() -> DataLoader[Any]:
    return training(
        form=lambda _, image, label: {"data": image, "label": label}, collate_fn=lambda items: [default_collate(items)]
    )


def one_data_set_for_both() -> tuple[Any, Any]:
    data = Augmented()
    return DataLoader(data, 5), DataLoader(data, 5)


def case(
    before: str, validation: Callable[[], Any], source: str = NO_THREAD, module: Any = Recording, snapshots: int = 3
) -> Case:
    return Case(source, before, module, lambda: (training(), validation()), snapshots=snapshots)


RIGHT = "right, and must stay so"
CASES = {
    "a file opened in the first __getitem__": case(
        "the file was opened in the main process, and the workers broke it",
        lambda: DataLoader(OpenedAtFirstUse(), 5, num_workers=1),
        source="pytorch#11929",
    ),
    "shuffled by a generator of its own": case(
        RIGHT, lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(4))
    ),
    "shuffled by the global stream": case(RIGHT, lambda: loader(shuffle=True)),
    "noise from generators of the data set": case("other noise from then on", lambda: DataLoader(Augmented(), 5)),
    "training reads the same data set": Case(NO_THREAD, "other noise from then on", Recording, one_data_set_for_both),
    "a stream that reads on": case("validation began 16 images later", lambda: DataLoader(ReadingOn(), 5), snapshots=2),
    "a stream out of one iterator": case(
        "validation began 16 images later", lambda: DataLoader(OpenedStream(), 5), snapshots=2
    ),
    "a stream that counts epochs": case(
        "other images in every validation", lambda: DataLoader(CountingEpochs(), 5), snapshots=2
    ),
    "a loader that is its own iterator": Case(
        "DALI#1615", "stopped: no images in a list of dicts", Dali, lambda: (in_dicts(), OwnIterator()), snapshots=2
    ),
    "a module that counts how often it makes its loader": case(RIGHT, lambda: None, module=OwnLoaders),
}


@pytest.mark.parametrize("name", CASES)
def test_the_data_are_left_as_training_reads_them(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["a stream that reads on", "a loader that is its own iterator"])
def test_so_it_is_with_a_sanity_check(name: str, tmp_path: Path) -> None:
    check(replace(CASES[name], trainer={"num_sanity_val_steps": 2}, snapshots=3), tmp_path)


def test_spawned_workers_open_the_file_themselves(tmp_path: Path) -> None:
    """They are given the data set by pickling, which an open file refuses: training ended at the first validation."""

    def loaders() -> tuple[Any, Any]:
        return training(), DataLoader(OpenedAtFirstUse(), 5, num_workers=1, multiprocessing_context="spawn")

    check(Case("pytorch#11929", "died", Recording, loaders, trainer={"max_epochs": 1}, snapshots=2), tmp_path)
