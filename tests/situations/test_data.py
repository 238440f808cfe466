"""Which images the probe is made of, from every kind of data set, sampler and loader."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    get_worker_info,
    random_split,
)
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import normalize, to_tensor
from torchvision.utils import save_image

from tests.models import CLASSES
from tests.situations.check import check, found_places
from tests.situations.project import COUNT, LABELS, Project, Samples, loader, pictures, training
from tests.situations.situation import NO_THREAD, Situation

NAMES = ["ant", "bee", "cat", "dog", "eel"]


class Resizing(Project):
    """Takes images of any size whose sides are multiples of 8."""

    def __init__(self) -> None:
        super().__init__(dynamic_img_size=True)


class TwoSets(Project):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Form(Project):
    """A step that knows the batch's form."""

    def __init__(self, images: Any, labels: Any) -> None:
        super().__init__()
        self._images, self._labels = images, labels

    def step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(self._images(batch)), self._labels(batch))


class Sharded(IterableDataset[Any]):
    """Reads what its worker is to read, and works in a worker only."""

    def __iter__(self) -> Iterator[Any]:
        worker: Any = get_worker_info()
        images = pictures()
        for index in range(worker.id, COUNT, worker.num_workers):
            yield images[index], LABELS[index]


class OpenedByWorker(Dataset[Any]):
    file: Tensor | None = None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            raise RuntimeError("the file is not open")
        return self.file[index], LABELS[index]


class BoundToItsProcess(Samples):
    """Cannot be read in another process, as a connection to a database cannot."""

    def __init__(self) -> None:
        super().__init__(pictures(), LABELS)
        self.process = os.getpid()

    def __getitem__(self, index: int) -> Any:
        if self.process != os.getpid():
            raise RuntimeError("the connection is another process's")
        return super().__getitem__(index)


class LosesItsFile(OpenedByWorker):
    """Its copy has no open file, as with data sets that drop theirs to be pickled."""

    def __init__(self) -> None:
        self.file = pictures()

    def __getstate__(self) -> dict[str, Any]:
        return {"file": None}


def open_file(_: int) -> None:
    worker: Any = get_worker_info()
    worker.dataset.file = pictures()


class Item(NamedTuple):
    picture: Tensor
    category: int


def images_of_three_sizes() -> list[Tensor]:
    sizes = [(32, 32) if index % 2 else ((24, 32), (32, 40))[index % 4 // 2] for index in range(COUNT)]
    return [image[:, :h, :w] for image, (h, w) in zip(pictures(size=40), sizes, strict=True)]


def split_of_one_set(part: int) -> DataLoader[Any]:
    data = Samples(pictures(count=2 * COUNT), [index // 8 for index in range(2 * COUNT)])
    return DataLoader(data, 5, sampler=SubsetRandomSampler(range(part, 2 * COUNT, 2)))


def formed(form: Any, images: Any, labels: Any, before: str) -> Situation:
    return Situation(
        source=NO_THREAD,
        before=before,
        module=lambda: Form(images, labels),
        validation=lambda: loader(form=form),
    )


STREAM = Situation(
    source="pytorch#14612",
    before="every snapshot failed: no worker in the main process",
    module=Project,
    validation=lambda: DataLoader(Sharded(), 8, num_workers=1),
    train=training,
)

SITUATIONS = {
    "split by SubsetRandomSampler": Situation(
        source=NO_THREAD,
        before="explained training images",
        module=Project,
        validation=lambda: split_of_one_set(1),
        train=lambda: split_of_one_set(0),
        fed=lambda: pictures(count=2 * COUNT)[1::2],
        labels=[index // 8 for index in range(1, 2 * COUNT, 2)],
    ),
    "images of different sizes, one a batch": Situation(
        source="vision#555",
        before="every snapshot failed: sizes differ in a batch",
        module=Resizing,
        validation=lambda: loader(images_of_three_sizes(), batch_size=1),
        fed=images_of_three_sizes,
        images=10,
    ),
    "two validation loaders": Situation(
        source=NO_THREAD,
        before="right: images of the first",
        module=TwoSets,
        validation=lambda: [loader(), loader(pictures(seed=8))],
        train=training,
        fed=lambda: torch.cat([pictures(), pictures(seed=8)]),
        labels=LABELS + LABELS,
    ),
    "two validation loaders side by side": Situation(
        source=NO_THREAD,
        before="no snapshot: the step failed with a batch of one loader",
        module=lambda: Form(lambda batch: batch["a"][0], lambda batch: batch["a"][1]),
        validation=lambda: CombinedLoader({"a": loader(batch_size=8), "b": loader(pictures(seed=8))}, "max_size_cycle"),
    ),
    "a stream that only works in a worker": STREAM,
    "a stream without a sanity check": replace(
        STREAM, first_step=2, says="first validation|step 2", trainer={"num_sanity_val_steps": 0, "max_epochs": 2}
    ),
    "data that are read in one process only": Situation(
        source=NO_THREAD,
        before="right",
        module=Project,
        validation=lambda: DataLoader(BoundToItsProcess(), 8),
        train=training,
        says="so the first validation images are explained",
    ),
    "data whose copy cannot be read": Situation(
        source=NO_THREAD,
        before="every snapshot failed; then, the first images were explained",
        module=Project,
        validation=lambda: DataLoader(LosesItsFile(), 8),
        train=training,
    ),
    "worker_init_fn opens the data": Situation(
        source="pytorch#14612",
        before="every snapshot failed: the file is not open",
        module=Project,
        validation=lambda: DataLoader(OpenedByWorker(), 5, num_workers=1, worker_init_fn=open_file),
        train=training,
    ),
    "(index, image, label)": formed(
        lambda index, image, label: (index, image, label),
        lambda batch: batch[1],
        lambda batch: batch[2],
        "stopped: the index was taken for the image",
    ),
    "nested dict": formed(
        lambda index, image, label: {"data": {"rgb": image}, "meta": {"id": index, "truth": label}},
        lambda batch: batch["data"]["rgb"],
        lambda batch: batch["meta"]["truth"],
        "stopped: no usual name",
    ),
    "webdataset's jpg and cls": formed(
        lambda _, image, label: {"__key__": "000", "jpg": image, "cls": label},
        lambda batch: batch["jpg"],
        lambda batch: batch["cls"],
        "stopped: no usual name",
    ),
    "a named tuple, and the label as a string too": formed(
        lambda _, image, label: (str(label), Item(image, label)),
        lambda batch: batch[1].picture,
        lambda batch: batch[1].category,
        "stopped: strings are no images",
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_probe_is_of_the_validation_data(name: str, tmp_path: Path) -> None:
    check(SITUATIONS[name], tmp_path)


def image_folder(folder: Path, batch_size: int = 5) -> Situation:
    """Five classes of eight pictures, sorted by class as folders are."""
    if not folder.exists():
        for index, image in enumerate(pictures(count=8 * CLASSES).sigmoid()):
            (folder / NAMES[index // 8]).mkdir(parents=True, exist_ok=True)
            save_image(image, folder / NAMES[index // 8] / f"{index:02}.png")

    def prepared(image: Any) -> Tensor:
        return normalize(to_tensor(image), [0.5] * 3, [0.25] * 3)

    data = ImageFolder(str(folder), prepared)
    return Situation(
        source="lightly-train#333",
        before="the first 16 images, of two classes",
        module=Project,
        validation=lambda: DataLoader(ImageFolder(str(folder), prepared), batch_size),
        train=lambda: DataLoader(ImageFolder(str(folder), prepared), 5, shuffle=True),
        fed=lambda: [data[index][0] for index in range(len(data))],
        labels=data.targets,
    )


@pytest.mark.parametrize("batch_size", [5, 16], ids=["small batches", "a sanity check that sees enough images"])
def test_an_image_folder_sorted_by_class(batch_size: int, tmp_path: Path) -> None:
    found = check(image_folder(tmp_path / "images", batch_size), tmp_path)
    labels = found.callback.tracker.probe.labels.tolist()
    assert set(Counter(labels).values()) <= {3, 4}, "every class as often as any other"
    assert len(Counter(labels)) == CLASSES
    assert set(labels[:6]) == set(range(CLASSES)), "the six images drawn are of all classes"
    assert found.callback.tracker.probe.class_names == NAMES


def test_without_labels_the_probe_is_spread_over_the_set(tmp_path: Path) -> None:
    class Unlabelled(Project):
        def step(self, batch: Any) -> Tensor:
            return self(batch).square().mean()

    def validation() -> DataLoader[Any]:
        return loader(pictures(count=100), [0] * 100, form=lambda _, image, __: image)

    situation = Situation(
        source="lightly-train#333",
        before="the first 16 images",
        module=Unlabelled,
        validation=validation,
        fed=lambda: pictures(count=100),
        labels=None,
        callback={"forward": lambda module, images: module(images)},  # no loss says what the outputs are
    )
    found = check(situation, tmp_path)
    places = found_places(found.callback.tracker.probe.images, pictures(count=100))
    assert {place // 25 for place in places} == {0, 1, 2, 3}


def wrapped(kind: str, folder: Path) -> Dataset[Any]:
    image_folder(folder)
    data = ImageFolder(str(folder), lambda image: normalize(to_tensor(image), [0.5] * 3, [0.25] * 3))
    if kind == "Subset":
        return Subset(data, range(0, 40, 2))
    if kind == "random_split":
        return random_split(data, [20, 20], torch.Generator().manual_seed(0))[0]
    if kind == "ConcatDataset":
        return ConcatDataset([Subset(data, range(0, 40, 4)), Subset(data, range(1, 40, 4))])
    return Subset(ConcatDataset([data, data]), range(0, 40, 2))


@pytest.mark.parametrize("kind", ["Subset", "random_split", "ConcatDataset", "Subset of a ConcatDataset"])
def test_class_names_are_found_through_what_wraps_a_data_set(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    data: Any = wrapped(kind, folder)
    samples = [data[index] for index in range(len(data))]
    situation = replace(
        image_folder(folder),
        before="classes were shown by number",
        validation=lambda: DataLoader(wrapped(kind, folder), 5),
        fed=lambda: [image for image, _ in samples],
        labels=[label for _, label in samples],
    )
    found = check(situation, tmp_path)
    assert found.callback.tracker.probe.class_names == NAMES


class Named(Samples):
    def __init__(self, **said: Any) -> None:
        super().__init__(pictures(), LABELS)
        vars(self).update(said)


@pytest.mark.parametrize(
    "said",
    [
        {"class_to_idx": {name: NAMES.index(name) for name in reversed(NAMES)}},
        {"classes": {name: index for index, name in enumerate(NAMES)}},
        {"features": {"image": SimpleNamespace(), "label": SimpleNamespace(names=NAMES)}},
    ],
    ids=["class_to_idx", "classes as a dict", "features of Hugging Face's data sets"],
)
def test_class_names_are_found_however_a_data_set_says_them(said: Any, tmp_path: Path) -> None:
    situation = Situation(NO_THREAD, "classes by number", Project, validation=lambda: DataLoader(Named(**said), 5))
    assert check(situation, tmp_path).callback.tracker.probe.class_names == NAMES
