"""The probe batch: what is taken out of a batch, and that collecting it disturbs nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from vit_explain_callback.lightning.data import ProbeBatch, first_batch

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


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_images_whatever_the_loader_shuffles_and_draws(workers: int) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Augmented(), batch_size=3, shuffle=True, num_workers=workers, generator=generator)
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state(), generator.get_state())
    images, labels = first_batch(loader, 4)
    again, _ = first_batch(loader, 4)
    after = (random.getstate(), str(np.random.get_state()), torch.get_rng_state(), generator.get_state())
    assert labels.tolist() == [0, 1, 2, 3]
    assert images.equal(again)
    assert before[:2] == after[:2]
    assert before[2].equal(after[2])
    assert before[3].equal(after[3])
    assert loader._iterator is None


def test_loaders_of_every_kind() -> None:
    dataset = TensorDataset(IMAGES, LABELS)
    sampler = BatchSampler(SequentialSampler(dataset), 2, drop_last=False)
    assert first_batch(DataLoader(dataset, batch_sampler=sampler), 5)[1].tolist() == [0, 1, 2, 3, 4]
    assert first_batch(DataLoader(dataset, batch_size=4), 99)[1].tolist() == LABELS.tolist()
    assert first_batch(DataLoader(Stream(), batch_size=2), 3).equal(IMAGES[:3])
    batches: Any = [(IMAGES[:2], LABELS[:2]), (IMAGES[2:], LABELS[2:])]
    assert first_batch(DataLoader(batches, batch_size=None), 3)[1].tolist() == [0, 1]
    assert first_batch(batches, 3)[1].tolist() == [0, 1]
    doubled = DataLoader(dataset, batch_size=4, collate_fn=lambda items: 2 * torch.stack([i for i, _ in items]))
    assert first_batch(doubled, 2).equal(2 * IMAGES[:2])
    with pytest.raises(ValueError, match="at least one batch"):
        first_batch([], 3)


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
    probe = ProbeBatch.from_batch(batch, 4)
    assert probe.images.equal(IMAGES[:4])
    assert probe.labels is not None
    assert probe.labels[:4].tolist() == [0, 1, 2, 3]
    assert len(probe) == 4 == len(probe.labels)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), {"image": IMAGES}, (IMAGES, torch.rand(10, 3)), (IMAGES, "cat")])
def test_labels_that_are_not_one_class_are_left_out(batch: Any) -> None:
    assert ProbeBatch.from_batch(batch).labels is None


def test_the_probe_is_a_copy() -> None:
    images = IMAGES.clone()
    probe = ProbeBatch.from_batch(images)
    images.zero_()
    assert probe.images.equal(IMAGES)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"audio": IMAGES}, ValueError, r"images under one of .* but got \['audio'\]"),
        (7, TypeError, "but got int. Give the images yourself"),
        (("a", "b"), TypeError, "images as one tensor, but got str"),
    ],
)
def test_other_batches_are_refused(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProbeBatch.from_batch(batch)
