"""Select the images that are shown: spread over the classes, and those that changed most."""

from __future__ import annotations

from torch import Tensor


def spread_over_classes(labels: Tensor, count: int) -> list[int]:
    """Indices of at most `count` images: the first of each class, then the second of each, and so on.

    Args:
        labels: (B,) class of each image; a negative one is not known, and such images come last.
        count: Images to select.

    Returns:
        Indices in the order of selection; classes take turns in the order in which they first appear.

    Example:
        >>> import torch
        >>> spread_over_classes(torch.tensor([4, 4, 4, 2, 2, 7]), 5)
        [0, 3, 5, 1, 4]
    """
    counts: dict[int, int] = {}
    turns = []
    for label in labels.tolist():
        turns.append((label < 0, counts.get(label, 0)))
        counts[label] = counts.get(label, 0) + 1
    return sorted(range(len(turns)), key=turns.__getitem__)[:count]


def most_changed(change: Tensor, count: int) -> list[int]:
    """Indices of at most `count` images that changed most, the most changed first; equal ones in their order.

    Args:
        change: (B,) larger where an image changed more, as 1 − rank correlation; NaN is left out.
        count: Images to select.

    Example:
        >>> import torch
        >>> most_changed(torch.tensor([0.1, float("nan"), 0.9, 0.3]), 2)
        [2, 3]
    """
    values = change.tolist()
    comparable = [index for index, value in enumerate(values) if value == value]
    return sorted(comparable, key=lambda index: -values[index])[:count]
