"""Take probe images from a trainer's validation data, without iterating what training iterates."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from vit_explain_callback.lightning._compat import Trainer
from vit_explain_callback.lightning.batches import joined
from vit_explain_callback.lightning.copies import copied
from vit_explain_callback.vit.isolation import preserved_random_state
from vit_explain_callback.vit.twin import Twin

_MOST_INDICES = 1_000_000


def probe_batch(trainer: Trainer, num_images: int) -> Any:
    """A batch of validation items, spread over the data and over its classes, as the loader would collate it.

    They are read from a copy of the data set, at indices that a copy of the loader's sampler gives, through a loader
    that is set up like the user's own.

    Returns:
        The batch, before any transfer hook; None for data that cannot be copied, streams and loaders of another kind:
        these must be watched as they go by.

    Raises:
        RuntimeError: If reading the copy fails.
    """
    loader = validation_loader(trainer)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    with preserved_random_state(seed=0):
        try:
            data, sampler, collate = copied((loader.dataset, loader.batch_sampler or loader.sampler, loader.collate_fn))
        except Exception:  # whatever it holds that has no copy: it is watched instead
            return None
        try:
            return _read(loader, data, sampler, collate, num_images)
        except Exception as error:
            raise RuntimeError(
                f"Reading the probe images from a copy of the validation data failed: {error!r}. Give images yourself: "
                "`ViTExplainCallback(images=(images, labels))`."
            ) from error


def validation_loader(trainer: Trainer) -> Any:
    """The validation loader, the first if there are several; None if there is none, or none yet."""
    loaders = trainer.val_dataloaders
    if loaders is None and trainer.enable_validation:  # Lightning makes them in the first epoch that is validated
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        loaders = _made(source) if source.is_module() else source.instance
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders


def _made(source: Any) -> Any:
    """What a `val_dataloader` hook would give, asked of a copy, as it may count or draw."""
    owner = source.instance
    with preserved_random_state():
        owner = Twin().copy(owner) if isinstance(owner, nn.Module) else copy.copy(owner)
        return getattr(owner, source.name)()


def class_names(trainer: Trainer) -> Sequence[str] | None:
    """Names of the classes, if the validation data say them, also through subsets and concatenations."""
    data = getattr(validation_loader(trainer), "dataset", None)
    while data is not None:
        if (names := _names(data)) is not None:
            return names
        parts = getattr(data, "datasets", None)
        data = parts[0] if isinstance(parts, list | tuple) and parts else getattr(data, "dataset", None)
    return None


def _names(data: Any) -> list[str] | None:
    """As torchvision's data sets say them, by `classes` or by `class_to_idx`, or Hugging Face's by their features."""
    features = getattr(data, "features", None)
    columns = features.values() if isinstance(features, Mapping) else ()
    said = [getattr(data, "classes", None), getattr(data, "class_to_idx", None)]
    for names in [*said, *(getattr(column, "names", None) for column in columns)]:
        if isinstance(names, list | tuple):
            return list(map(str, names))
        if isinstance(names, Mapping) and all(index in names.values() for index in range(len(names))):
            return [str(name) for name in sorted(names, key=names.__getitem__)]
    return None


def spread(indices: Sequence[int], labels: Sequence[int] | None, count: int) -> list[int]:
    """Choose `count` of some indices: class by class in turn where labels are known, evenly spaced among their like.

    Example:
        >>> spread(range(9), None, 3)
        [1, 4, 7]
        >>> spread(range(6), [0, 0, 0, 0, 1, 1], 4)
        [1, 4, 3, 5]
    """
    groups: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        groups.setdefault(0 if labels is None else labels[place], []).append(index)
    names = sorted(groups)
    if len(names) > count:
        names = [names[place] for place in _even(len(names), count)]
    shares = Counter(itertools.islice(itertools.cycle(names), max(count, 0)))
    chosen = {name: [groups[name][at] for at in _even(len(groups[name]), shares[name])] for name in names}
    rounds = itertools.zip_longest(*(chosen[name] for name in names))
    found = [index for turn in rounds for index in turn if index is not None]
    rest = [index for index in indices if index not in set(found)]
    return found + [rest[at] for at in _even(len(rest), count - len(found))]


def _even(length: int, count: int) -> list[int]:
    """At most `count` of the places 0 … length − 1, evenly spaced."""
    count = min(length, max(count, 0))
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def labels_of(data: Any) -> Sequence[int] | None:
    """The label of each item, where a data set says them without reading its items."""
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


def _read(loader: DataLoader[Any], data: Any, sampler: Any, collate: Any, num_images: int) -> Any:
    drawn = itertools.islice(_of_all_processes(sampler), _MOST_INDICES)
    batched = loader.batch_sampler is not None
    flat = itertools.chain.from_iterable(drawn) if batched else drawn
    indices = sorted(set(itertools.islice(flat, _MOST_INDICES)))
    labels = labels_of(data)
    known = None if labels is None or len(labels) != len(data) else [labels[index] for index in indices]
    chosen = spread(indices, known, num_images)
    if not batched:  # each item is a batch
        return joined(list(_items(loader, data, chosen)), num_images)
    items = list(_items(loader, data, chosen))
    if len(_alike(items)) < len(items):
        more = [index for index in spread(indices, None, 3 * num_images) if index not in set(chosen)]
        items = _alike([*items, *_items(loader, data, more)])[:num_images]
    return collate(items) if items else None


def _of_all_processes(sampler: Any) -> Iterator[Any]:
    """What a sampler gives, on all processes together where each has a share."""
    inner = getattr(sampler, "sampler", sampler)
    for rank in range(inner.num_replicas if isinstance(inner, DistributedSampler) else 1):
        if isinstance(inner, DistributedSampler):
            inner.rank = rank
        yield from sampler


def _items(loader: DataLoader[Any], data: Any, indices: list[int]) -> Any:
    """Items of the copied data, read by a worker of the user's own kind if there are any."""
    workers = min(1, loader.num_workers)
    options: dict[str, Any] = {}
    if workers:
        options = {"multiprocessing_context": loader.multiprocessing_context, "timeout": loader.timeout}
    return DataLoader(
        data,
        batch_size=None,
        sampler=indices,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
        **options,
    )


def _unchanged(item: Any) -> Any:
    return item


def _alike(items: list[Any]) -> list[Any]:
    """The items whose images have the commonest size."""
    sizes = [_sizes(item) for item in items]
    commonest = Counter(sizes).most_common(1)[0][0] if sizes else ()
    return [item for item, size in zip(items, sizes, strict=True) if size == commonest]


def _sizes(item: Any) -> tuple[Any, ...]:
    found: list[tuple[int, ...]] = []
    apply_to_collection(
        item, (Tensor, np.ndarray), lambda part: found.append(tuple(part.shape)) if part.ndim > 1 else 0
    )
    return tuple(found)
