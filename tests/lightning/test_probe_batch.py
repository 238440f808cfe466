"""The probe images: which are taken, what is taken out of a batch, and that reading them disturbs nothing."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
    random_split,
)

from vit_explain_callback.isolation.child import can_fork
from vit_explain_callback.lightning.batches import BatchBuffer, images_and_labels, pick_rows
from vit_explain_callback.lightning.items import labels_of, spread_over_classes
from vit_explain_callback.lightning.probe_batch import probe_batch

IMAGES = torch.arange(40.0).reshape(10, 1, 2, 2)
LABELS = torch.arange(10)


class Augmented(Dataset[tuple[Tensor, int]]):
    """Draws from every global stream for each item."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(1) + random.random() + np.random.rand()
        return IMAGES[index] + noise.float(), index


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(IMAGES)


WAYS = [pytest.param(True, id="fork", marks=pytest.mark.skipif(not can_fork(), reason="no fork")), False]


@pytest.fixture
def forks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the probe is read in a forked process."""
    monkeypatch.setattr("vit_explain_callback.lightning.probe_batch.can_fork", lambda: request.param)
    return bool(request.param)


def taken(loader: Any, count: int) -> Any:
    trainer: Any = SimpleNamespace(val_dataloaders=loader, enable_validation=True)
    return probe_batch(trainer, count)


class Telling(Dataset[int]):
    """Tells the process that reads it, and which worker it is."""

    def __init__(self) -> None:
        self.maker = os.getpid()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        return os.getpid() != self.maker, -1 if worker is None else worker.id


class Finalised(Telling):
    def __del__(self) -> None: ...


class Locked(Telling):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def listed(items: Any) -> Any:
    return [list(item) for item in items]


@pytest.mark.parametrize("forks", WAYS, indirect=True)
@pytest.mark.parametrize("made", [Telling, Finalised, Locked])
@pytest.mark.parametrize("context", [None, "spawn"])
def test_which_process_reads(made: Any, context: str | None, forks: bool) -> None:
    """Where there is no fork, only the scripts of users whose loaders have workers can be imported by a new process."""
    loader = DataLoader(made(), 2, num_workers=1 if context else 0, multiprocessing_context=context, collate_fn=listed)
    found = taken(loader, 2)
    if forks or (context and made is not Locked):
        assert found == [[True, 0 if context else -1]] * 2
    elif made is Telling:
        assert found == [[False, -1]] * 2
    else:
        assert found is None, "no copy is made of what has a finaliser or a lock"


@pytest.mark.parametrize("forks", [True], indirect=True)
def test_where_there_can_be_no_further_process_a_copy_is_read(forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full, raising=False)
    assert taken(DataLoader(Telling(), 2, collate_fn=listed), 2) == [[False, -1]] * 2


@pytest.mark.parametrize("forks", WAYS, indirect=True)
def test_an_error_is_told_whoever_reads(forks: bool) -> None:
    class Broken(Telling):
        def __getitem__(self, index: int) -> Any:
            raise OSError("the share is gone")

    with pytest.raises(RuntimeError, match=r"failed: OSError\('the share is gone'\).*images=\(") as caught:
        taken(DataLoader(Broken(), 2), 2)
    assert repr(caught.value.__cause__) == "OSError('the share is gone')"


@pytest.mark.parametrize("forks", WAYS, indirect=True)
def test_items_that_are_batches_are_converted_as_the_loader_does(forks: bool) -> None:
    batches: Any = [(IMAGES[:3].numpy(), LABELS[:3].numpy()), (IMAGES[3:6].numpy(), LABELS[3:6].numpy())]
    images, labels = taken(DataLoader(batches, batch_size=None), 6)
    assert images.equal(IMAGES[:6])
    assert labels.tolist() == list(range(6))


@pytest.mark.parametrize("forks", WAYS, indirect=True)
@pytest.mark.parametrize("workers", [0, 2])
def test_spread_images_whatever_the_loader_shuffles_and_draws(workers: int, forks: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Augmented(), batch_size=3, shuffle=True, num_workers=workers, generator=generator)
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state(), generator.get_state())
    images, labels = taken(loader, 5)
    again, _ = taken(loader, 5)
    after = (random.getstate(), str(np.random.get_state()), torch.get_rng_state(), generator.get_state())
    assert labels.tolist() == [1, 3, 5, 7, 9]
    assert images.equal(again)
    assert before[:2] == after[:2]
    assert before[2].equal(after[2])
    assert before[3].equal(after[3])
    assert loader._iterator is None


@pytest.mark.parametrize("forks", WAYS, indirect=True)
def test_loaders_of_every_kind(forks: bool) -> None:
    dataset = TensorDataset(IMAGES, LABELS)
    sampler = BatchSampler(SequentialSampler(dataset), 2, drop_last=False)
    assert taken(DataLoader(dataset, batch_sampler=sampler), 10)[1].tolist() == LABELS.tolist()
    assert taken(DataLoader(dataset, batch_size=4), 99)[1].tolist() == LABELS.tolist()
    assert taken(DataLoader(dataset, batch_size=2, sampler=SubsetRandomSampler([2, 8])), 9)[1].tolist() == [2, 8]
    batches: Any = [(IMAGES[:2], LABELS[:2]), (IMAGES[2:4], LABELS[2:4]), (IMAGES[4:], LABELS[4:])]
    assert taken(DataLoader(batches, batch_size=None), 3)[1].tolist() == [0, 1, 2, 3]
    doubled = DataLoader(dataset, batch_size=4, collate_fn=lambda items: 2 * torch.stack([i for i, _ in items]))
    assert taken(doubled, 10).equal(2 * IMAGES)


@pytest.mark.parametrize("forks", WAYS, indirect=True)
def test_a_sampler_that_divides_the_data_among_processes_gives_all_of_them(forks: bool) -> None:
    dataset = TensorDataset(IMAGES, LABELS)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=4, rank=0, shuffle=False)
    assert taken(DataLoader(dataset, 2, sampler=sampler), 10)[1].tolist() == LABELS.tolist()
    assert sampler.rank == 0


@pytest.mark.parametrize("forks", WAYS, indirect=True)
def test_what_streams_or_is_no_loader_of_torchs_is_watched(forks: bool) -> None:
    assert taken(DataLoader(Stream(), batch_size=2), 3) is None
    assert taken([(IMAGES, LABELS)], 3) is None
    watched = BatchBuffer(3)
    for start in (0, 2, 4, 6):
        batch: dict[str, Any] = {"x": IMAGES[start : start + 2].clone(), "names": ["a", "b"], "scale": 3}
        watched.add(batch)
        batch["x"].zero_()
    assert watched.batch["x"].equal(IMAGES[:4])
    assert (watched.batch["names"], watched.batch["scale"]) == (["a", "b", "a", "b"], 3)


def test_classes_take_turns_where_labels_are_known_without_reading() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    data = TensorDataset(IMAGES, labels)
    assert labels_of(ConcatDataset([Subset(data, [9, 0]), data]))[:3] == [2, 0, 0]  # type: ignore[index]
    assert labels_of(random_split(data, [4, 6])[0]) is not None
    assert labels_of(Augmented()) is None
    chosen = spread_over_classes(range(10), labels.tolist(), 6)
    assert [int(labels[index]) for index in chosen[:3]] == [0, 1, 2]
    assert len(set(chosen)) == 6
    for count in range(1, 12):
        assert len(spread_over_classes(range(10), labels.tolist(), count)) == min(count, 10)
        assert len(set(spread_over_classes(range(10), None, count))) == min(count, 10)


@pytest.mark.parametrize("forks", WAYS, indirect=True)
def test_images_of_the_commonest_size_are_taken(forks: bool) -> None:
    odd: Any = [(torch.full((1, 2 + index % 3 // 2, 2), float(index)), index) for index in range(12)]
    images, labels = taken(DataLoader(odd, batch_size=1), 6)
    assert images.shape == (6, 1, 2, 2)
    assert all(label % 3 < 2 for label in labels.tolist())


def test_rows_are_picked_from_a_batch_of_any_form() -> None:
    batch = {"deep": [(IMAGES, "same"), {"y": LABELS}], "names": list("abcdefghij"), "size": torch.tensor(3)}
    found = pick_rows(batch, [7, 1], 10)
    assert found["deep"][0][0].equal(IMAGES[[7, 1]])
    assert found["deep"][0][1] == "same"
    assert found["deep"][1]["y"].tolist() == [7, 1]
    assert found["names"] == ["h", "b"]
    assert found["size"] == 3
    assert pick_rows([IMAGES[:2], LABELS[:2]], [1], 2)[1].tolist() == [1]  # a pair, not two items


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS, "more"],
        {"image": IMAGES, "label": LABELS},
        {"pixel_values": IMAGES, "labels": LABELS, "id": 3},
        (IMAGES, LABELS[:, None]),
        (IMAGES, LABELS.tolist()),
    ],
)
def test_images_and_labels_are_found(batch: Any) -> None:
    images, labels = images_and_labels(batch)
    assert images.equal(IMAGES)
    assert labels is not None
    assert labels.equal(LABELS)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), {"image": IMAGES}, (IMAGES, torch.rand(10, 3)), (IMAGES, "cat")])
def test_labels_that_are_not_one_class_are_left_out(batch: Any) -> None:
    assert images_and_labels(batch)[1] is None


def test_the_probe_is_a_copy() -> None:
    images = IMAGES.clone()
    found, _ = images_and_labels(images)
    images.zero_()
    assert found.equal(IMAGES)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"audio": IMAGES}, ValueError, r"images under one of .* but got \['audio'\]"),
        (7, TypeError, "but got int. Pass the images"),
        (("a", "b"), TypeError, "images as one tensor, but got str. Pass the images"),
    ],
)
def test_other_batches_are_refused(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        images_and_labels(batch)
