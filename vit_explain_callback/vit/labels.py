"""Read labels and the task off the targets that a loss compared outputs with."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Task: TypeAlias = Literal["classification", "multilabel", "regression"]
Reading: TypeAlias = Literal["classes", "distribution", "yes_or_no", "signs", "numbers"]


def read_labels(reading: Reading, target: Tensor, columns: int) -> tuple[Tensor | None, Task]:
    """The class of each image, (B,), -1 where it has none that the outputs know, and what the outputs are.

    Args:
        reading: How the target is to be read.
        target: What outputs were compared with.
        columns: C, the number of outputs of an image.

    Returns:
        Labels, None where there are no classes or none is known, and the task.
    """
    target = target.detach()
    if reading == "numbers":
        return None, "regression"
    if reading in ("yes_or_no", "signs"):
        return _yes_or_no((target > 0).float() if reading == "signs" else target)
    if target.ndim == 2 and target.shape[1] == columns > 1:
        return _of_distribution(target), "classification"
    if target.is_floating_point() or target.numel() != len(target):
        return None, "classification"
    classes = target.reshape(-1).long()
    return torch.where((classes >= 0) & (classes < max(columns, 2)), classes, -1), "classification"


def are_numbers(target: Tensor) -> bool:
    """Whether targets, one an image, are of many values: neither yes nor no, nor these two smoothed."""
    return target.numel() == len(target) and len(set(target.detach().flatten().tolist())) > 2 + bool((target < 0).any())


def _of_distribution(target: Tensor) -> Tensor | None:
    """The likeliest class of each row, if rows are distributions over classes."""
    rows = target.double()
    rows = -rows if (rows <= 0).all() else rows  # as `-(target * log_probabilities)` has them
    is_one = bool(((rows.sum(dim=1) - 1).abs() < 1e-3).all() and (rows >= 0).all())
    return rows.argmax(dim=1) if is_one else None


def _yes_or_no(target: Tensor) -> tuple[Tensor | None, Task]:
    """0 or 1; of several questions, the one yes of each image.

    Where an image has several, or none, the questions are asked one by one, and no class is the label.
    """
    if are_numbers(target):
        return None, "regression"
    if target.ndim == 1 or (target.ndim == 2 and target.shape[1] == 1):
        flat = target.reshape(-1).float()
        return torch.where((flat >= 0) & (flat <= 1), (flat > 0.5).long(), -1), "classification"
    positive = target > 0.5
    if target.ndim == 2 and len(target) > 1 and (positive.sum(dim=1) == 1).all():
        return positive.long().argmax(dim=1), "classification"
    return None, "multilabel"
