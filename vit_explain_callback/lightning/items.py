"""Choose items of a data set, spread over it and its classes, and read them as its loader does."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset
from torch.utils.data._utils import worker

from vit_explain_callback.lightning.batches import joined

_MOST_INDICES = 1_000_000


@dataclass(frozen=True)
class Source:
    """The data set, sampler and collate function of a loader.

    Attributes:
        data: A data set that is read by index.
        sampler: Yields indices, or lists of them.
        collate: Makes a batch of items, or of one item if the loader does not batch.
        is_batched: Whether the loader batches.
        in_worker: Sets up the loader's workers, if there are any.
        has_workers: Whether there are.
    """

    data: Any
    sampler: Any
    collate: Callable[[Any], Any]
    is_batched: bool
    in_worker: Callable[[int], object] | None
    has_workers: bool

    @classmethod
    def of(cls, loader: Any) -> Source | None:
        """The source of a loader; None for streams and other kinds of loaders, which must be watched."""
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return None
        return cls(
            loader.dataset,
            loader.batch_sampler or loader.sampler,
            loader.collate_fn,
            loader.batch_sampler is not None,
            loader.worker_init_fn,
            loader.num_workers > 0,
        )

    def become_worker(self) -> None:
        """Set this process up as a worker of the loader, if it has workers."""
        if self.has_workers:
            info: Any = worker.WorkerInfo
            worker._worker_info = info(id=0, num_workers=1, seed=torch.initial_seed(), dataset=self.data)
            if self.in_worker is not None:
                self.in_worker(0)

    def read(self, num_images: int, beat: Callable[[], object] = lambda: None) -> Any:
        """Read a batch of items; None if there are none.

        Args:
            num_images: Number of items to read, or of images if each item is a batch.
            beat: Called after each item.
        """

        def items(places: list[int]) -> Iterator[Any]:
            for place in places:
                yield self.data[place]
                beat()

        indices = self._indices()
        labels = labels_of(self.data)
        classes = None if labels is None or len(labels) != len(self.data) else [labels[index] for index in indices]
        chosen = spread_over_classes(indices, classes, num_images)
        if not self.is_batched:  # each item is a batch
            return joined([self.collate(item) for item in items(chosen)], num_images)
        read = list(items(chosen))
        if len(_of_most_common_size(read)) < len(read):
            candidates = spread_over_classes(indices, None, 3 * num_images)
            more = [index for index in candidates if index not in set(chosen)]
            read = _of_most_common_size([*read, *items(more)])[:num_images]
        return self.collate(read) if read else None

    def _indices(self) -> list[int]:
        drawn = itertools.islice(_of_all_processes(self.sampler), _MOST_INDICES)
        flat = itertools.chain.from_iterable(drawn) if self.is_batched else drawn
        return sorted(set(itertools.islice(flat, _MOST_INDICES)))


def spread_over_classes(indices: Sequence[int], labels: Sequence[int] | None, count: int) -> list[int]:
    """Choose `count` indices, evenly spaced; with labels, the classes take turns and each is evenly spaced.

    Example:
        >>> spread_over_classes(range(9), None, 3)
        [1, 4, 7]
        >>> spread_over_classes(range(6), [0, 0, 0, 0, 1, 1], 4)
        [1, 4, 3, 5]
    """
    groups: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        groups.setdefault(0 if labels is None else labels[place], []).append(index)
    names = sorted(groups)
    if len(names) > count:
        names = [names[place] for place in _evenly_spaced(len(names), count)]
    shares = Counter(itertools.islice(itertools.cycle(names), max(count, 0)))
    chosen = {name: [groups[name][at] for at in _evenly_spaced(len(groups[name]), shares[name])] for name in names}
    rounds = itertools.zip_longest(*(chosen[name] for name in names))
    taking_turns = [index for turn in rounds for index in turn if index is not None]
    rest = [index for index in indices if index not in set(taking_turns)]
    return taking_turns + [rest[at] for at in _evenly_spaced(len(rest), count - len(taking_turns))]


def _evenly_spaced(length: int, count: int) -> list[int]:
    """At most `count` of the places 0 … length − 1, evenly spaced."""
    count = min(length, max(count, 0))
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def labels_of(data: Any) -> Sequence[int] | None:
    """The label of each item, if the data set lists them without reading its items."""
    if isinstance(data, Subset):
        inner = labels_of(data.dataset)
        return None if inner is None else [inner[index] for index in data.indices]
    if isinstance(data, ConcatDataset):
        parts = [labels_of(part) for part in data.datasets]
        return None if None in parts else [label for part in parts for label in part or ()]
    if isinstance(data, TensorDataset) and len(data.tensors) > 1:
        return _as_labels(data.tensors[1], len(data))
    for name in ("targets", "labels", "_labels", "y"):
        if (labels := _as_labels(getattr(data, name, None), len(data))) is not None:
            return labels
    samples = getattr(data, "samples", getattr(data, "imgs", None))
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple):
        return _as_labels([sample[-1] for sample in samples], len(data))
    return None


def _as_labels(values: Any, count: int) -> Sequence[int] | None:
    if not isinstance(values, list | tuple | Tensor | np.ndarray) or len(values) != count:
        return None
    array = np.asarray(values)
    return array.tolist() if array.ndim == 1 and array.dtype.kind in "iub" else None


def _of_all_processes(sampler: Any) -> Iterator[Any]:
    """What a sampler yields on all processes together."""
    inner = getattr(sampler, "sampler", sampler)
    for rank in range(inner.num_replicas if isinstance(inner, DistributedSampler) else 1):
        if isinstance(inner, DistributedSampler):
            inner.rank = rank
        yield from sampler


def _of_most_common_size(items: list[Any]) -> list[Any]:
    """The items whose images have the most common size."""
    sizes = [_sizes(item) for item in items]
    most_common = Counter(sizes).most_common(1)[0][0] if sizes else ()
    return [item for item, size in zip(items, sizes, strict=True) if size == most_common]


def _sizes(item: Any) -> tuple[Any, ...]:
    sizes: list[tuple[int, ...]] = []
    apply_to_collection(
        item, (Tensor, np.ndarray), lambda part: sizes.append(tuple(part.shape)) if part.ndim > 1 else 0
    )
    return tuple(sizes)
