"""The images that are shown, against the slow way of choosing them."""

from __future__ import annotations

import math

import pytest
import torch

from vit_explain_callback.visualization.selection import most_changed, spread_over_classes


def naive_spread(labels: list[int], count: int) -> list[int]:
    """Go round the classes, taking the next image of each, until there are enough; unknown ones at the end."""
    known = [label for label in dict.fromkeys(labels) if label >= 0]
    queues = [[index for index, label in enumerate(labels) if label == wanted] for wanted in known]
    chosen: list[int] = []
    while any(queues):
        # A round takes one of each class, in the order in which they stand in the batch.
        chosen += sorted(queue.pop(0) for queue in queues if queue)
    for wanted in dict.fromkeys(label for label in labels if label < 0):
        chosen += [index for index, label in enumerate(labels) if label == wanted]
    return chosen[:count]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 4, 6, 40])
def test_images_are_spread_over_classes(seed: int, count: int) -> None:
    labels = torch.randint(-1, 5, (30,), generator=torch.Generator().manual_seed(seed))
    chosen = spread_over_classes(labels, count)
    assert chosen == naive_spread(labels.tolist(), count)
    assert len(set(chosen)) == min(count, 30)


def test_sorted_classes_are_all_shown() -> None:
    labels = torch.arange(8).repeat_interleave(10)
    assert labels[spread_over_classes(labels, 8)].tolist() == list(range(8))
    assert sorted(labels[spread_over_classes(labels, 16)].tolist()) == sorted(list(range(8)) * 2)


def test_the_most_changed_come_first() -> None:
    change = torch.tensor([0.2, math.nan, 0.9, 0.9, -0.1])
    assert most_changed(change, 3) == [2, 3, 0]
    assert most_changed(change, 9) == [2, 3, 0, 4]
    assert most_changed(torch.full((3,), math.nan), 2) == []
