"""Batches of any form: pick rows, concatenate, find images and labels."""

from __future__ import annotations

import copy
import itertools
import random
import types
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

_IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs", "jpg", "png")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "cls")


def cloned(batch: Any) -> Any:
    """A copy of a batch whose tensors a step may write to."""
    return apply_to_collection(batch, Tensor, lambda part: part.detach().clone())


def pick_rows(batch: Any, rows: list[int], count: int, leaves: Collection[int] | None = None) -> Any:
    """Pick rows of a batch of any form: of every part that has `count` rows.

    Args:
        batch: Any batch.
        rows: Rows to pick.
        count: Number of rows of the batch.
        leaves: Indices, as in `trace.leaves_of`, of the tensors with a row for each image; None: all tensors with
            `count` rows.

    Example:
        >>> pick_rows({"image": torch.arange(3), "size": (4, 4), "names": ["a", "b", "c"]}, [2, 0], 3)
        {'image': tensor([2, 0]), 'size': (4, 4), 'names': ['c', 'a']}
    """
    return _pick(batch, rows, count, leaves, itertools.count())


def _pick(batch: Any, rows: list[int], count: int, leaves: Collection[int] | None, place: Iterator[int]) -> Any:
    if isinstance(batch, Tensor | np.ndarray):
        is_of_images = not isinstance(batch, Tensor) or next(place) in (leaves or ()) or leaves is None
        if batch.ndim > 0 and len(batch) == count and is_of_images:
            return batch[rows]
        return batch.clone() if isinstance(batch, Tensor) else batch.copy()
    more = (rows, count, leaves, place)
    if isinstance(batch, dict):
        parts = {key: _pick(part, *more) for key, part in batch.items()}
        return type(batch)(parts) if type(batch) is dict else _like(batch, parts)
    if isinstance(batch, list | tuple):
        if len(batch) == count and not any(has_rows(part, count) for part in batch):
            items: Any = [batch[row] for row in rows]
        else:
            items = [_pick(part, *more) for part in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if hasattr(batch, "__dict__") and not isinstance(batch, type | types.FunctionType | random.Random):
        return _like(batch, {}, {name: _pick(part, *more) for name, part in vars(batch).items()})
    return batch


def _like(value: Any, items: dict[Any, Any], attributes: dict[str, Any] | None = None) -> Any:
    clone = copy.copy(value)
    for key, part in items.items():
        clone[key] = part
    for name, part in (attributes or {}).items():
        object.__setattr__(clone, name, part)
    return clone


def has_rows(part: Any, count: int) -> bool:
    """Whether a part of a batch holds tensors with `count` rows."""
    if isinstance(part, Tensor | np.ndarray):
        return part.ndim > 0 and len(part) == count
    if isinstance(part, dict):
        return any(has_rows(value, count) for value in part.values())
    return isinstance(part, list | tuple) and any(has_rows(value, count) for value in part)


def images_in(batch: Any) -> int:
    """Number of images in a batch of any form: rows of its first four-dimensional tensor, else of its first tensor."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    rows = [tensor for tensor in tensors if tensor.ndim == 4] or [tensor for tensor in tensors if tensor.ndim > 0]
    return len(rows[0]) if rows else 0


def joined(batches: list[Any], num_images: int) -> Any:
    """Concatenate the batches whose images have the most common size; None if there is no batch."""
    if not batches:
        return None
    sizes = [_sizes_of_rows(batch) for batch in batches]
    most_common = Counter(sizes).most_common(1)[0][0]
    alike = [batch for batch, size in zip(batches, sizes, strict=True) if size == most_common]
    needed = list(itertools.accumulate(map(images_in, alike)))
    used = alike[: next((place + 1 for place, total in enumerate(needed) if total >= num_images), len(alike))]
    return _concatenated(used, [images_in(batch) for batch in used])


def _sizes_of_rows(batch: Any) -> tuple[Any, ...]:
    sizes: list[tuple[int, ...]] = []
    apply_to_collection(batch, Tensor, lambda part: sizes.append(tuple(part.shape[1:])) if part.ndim > 1 else 0)
    return tuple(sizes)


def _concatenated(parts: list[Any], rows: list[int]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim > 0 and len(first) == rows[0] else first
    if isinstance(first, dict):
        return type(first)({key: _concatenated([part[key] for part in parts], rows) for key in first})
    if isinstance(first, list | tuple):
        if len(first) == rows[0] and not has_rows(first, rows[0]):
            return type(first)(item for part in parts for item in part)
        items = [_concatenated(list(column), rows) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


class BatchBuffer:
    """Buffers validation batches as they reach the module, until they hold enough images.

    Args:
        num_images: Number of images to buffer.
    """

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self._batches: list[Any] = []
        self._count = 0

    def add(self, batch: Any) -> None:
        """Buffer a copy of a batch on the CPU, unless there are enough images."""
        if self._count < self._num_images:
            self._batches.append(apply_to_collection(batch, Tensor, lambda part: part.detach().to("cpu", copy=True)))
            self._count += images_in(batch)

    @property
    def batch(self) -> Any:
        """The buffered batches as one; None if there is none."""
        return joined(self._batches, self._num_images)


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and class labels of a batch, on the CPU: a tensor, an (images, labels, …) pair or a mapping.

    Labels that are not one class index per image (soft labels, several labels, boxes) are left out; those of a
    one-logit head may be floats, 0 and 1.

    Raises:
        TypeError: If the batch is of another kind.
        ValueError: If a mapping has no image under a usual name, or there are more or fewer labels than images.
    """
    images, labels = _parts(batch)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"Expected a batch with its images as one tensor, but got {type(images).__name__}. Pass the images: "
            "`ViTExplainCallback(images=(images, labels))`."
        )
    images = images.detach().to("cpu", copy=True)
    if isinstance(labels, Sequence) and all(isinstance(label, int) for label in labels):
        labels = torch.tensor(labels)
    if not isinstance(labels, Tensor) or labels.shape[1:] not in ((), (1,)) or (labels != labels.round()).any():
        return images, None
    labels = labels.detach().flatten().to("cpu", torch.int64, copy=True)
    if len(labels) != len(images):
        raise ValueError(f"Expected one label per image, but got {len(images)} images and {len(labels)} labels.")
    return images, labels


def _parts(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        if images is None:
            raise ValueError(f"Expected a batch with images under one of {_IMAGE_KEYS}, but got {list(batch)}.")
        return images, next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    if isinstance(batch, Sequence) and len(batch) > 0:
        return batch[0], batch[1] if len(batch) > 1 else None
    raise TypeError(
        f"Expected a batch that is a tensor, an (images, labels) pair or a mapping, but got {type(batch).__name__}. "
        "Pass the images: `ViTExplainCallback(images=(images, labels))`."
    )
