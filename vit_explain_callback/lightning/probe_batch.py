"""Read probe images and class names from a trainer's validation data, without touching what training uses."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import weakref
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from vit_explain_callback.isolation.child import Beat, Lost, can_fork, in_fork, in_spawn
from vit_explain_callback.isolation.data_copy import copied
from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.isolation.undisturbed import preserved_random_state
from vit_explain_callback.lightning._compat import Trainer
from vit_explain_callback.lightning.items import Source
from vit_explain_callback.tracking.errors import warn

_hanging: weakref.WeakSet[Trainer] = weakref.WeakSet()  # so that a data set that hangs is waited for only once
_not_finalised: list[Any] = []  # objects of a forked process, which ends without finalising them


def probe_batch(trainer: Trainer, num_images: int, any_items: bool = False) -> Any:
    """Read a batch of validation items, spread over the data and its classes, collated as the loader does.

    They are read in a forked process, which has the user's project as it is and cannot change this one. Without
    fork, they are read in a new process if the loader's workers are such processes, else here from a copy of the data.

    Args:
        trainer: Its loaders are read.
        num_images: Number of items.
        any_items: Whether any items will do, also training items if there are none to validate; then no warning is
            given if reading hangs.

    Returns:
        The batch, before any transfer hook. None for streams and other kinds of loaders, for data that can neither be
        sent to another process nor copied, and, with a warning, if reading hangs or dies: these must be watched.

    Raises:
        RuntimeError: If reading fails.
    """
    if trainer in _hanging:
        return None
    try:
        return _read(trainer, num_images, any_items)
    except Lost as error:
        _hanging.add(trainer)
        if not any_items:
            warn(
                f"reading the validation data in a separate process was given up ({error}), so the first validation "
                "images are explained. Pass `images=(images, labels)` to choose others."
            )
        return None
    except Exception as error:
        raise RuntimeError(
            f"Reading the probe images failed: {error!r}. Pass the images: "
            "`ViTExplainCallback(images=(images, labels))`."
        ) from error


def class_names(trainer: Trainer) -> Sequence[str] | None:
    """Class names, if the validation data have them, also through subsets and concatenations."""
    if trainer in _hanging or (trainer.val_dataloaders is None and not trainer.enable_validation):
        return None
    try:
        if can_fork():
            with contextlib.suppress(OSError):  # no further process can be started
                names: list[str] | None = in_fork(lambda _: _all_names(_loader(trainer, _loaders_of_hook)))
                return names
        with preserved_random_state():
            return _all_names(_loader(trainer, _loaders_of_copied_hook))
    except Exception as error:
        warn(f"the class names of the validation data cannot be read ({error!r}). Pass `class_names=` to show them.")
        return None


def validation_size(trainer: Trainer) -> int | None:
    """Number of items in the validation set; None if the loader does not exist yet or has no length."""
    loader = _loader(trainer, lambda _: None)
    is_batched = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    return len(loader.dataset) if is_batched and isinstance(loader.dataset, Sized) else None


def _read(trainer: Trainer, num_images: int, any_items: bool) -> Any:
    if can_fork():
        with contextlib.suppress(OSError):
            load = partial(_loader, trainer, _loaders_of_hook, any_items)
            return in_fork(lambda beat: _read_in_process(Source.of(load()), num_images, beat))
    loader = _loader(trainer, _loaders_of_copied_hook, any_items)
    source = Source.of(loader)
    if source is None:
        return None
    if _spawns_workers(loader):
        with contextlib.suppress(OSError, TypeError, AttributeError, pickle.PicklingError):
            return in_spawn(partial(_read_pickled, pickle.dumps(source), num_images))
    with preserved_random_state(seed=0):
        try:
            source = copied(source)
        except Exception:  # it holds something that has no copy, so it is watched instead
            return None
        return source.read(num_images)


def _read_in_process(source: Source | None, num_images: int, beat: Beat) -> Any:
    """Read a batch in a process that was started for it."""
    _not_finalised.append(source)
    if source is None:
        return None
    with preserved_random_state(seed=0):
        source.become_worker()
        return source.read(num_images, beat)


def _read_pickled(pickled: bytes, num_images: int, beat: Beat) -> Any:
    return _read_in_process(pickle.loads(pickled), num_images, beat)


def _spawns_workers(loader: DataLoader[Any]) -> bool:
    """Whether the loader starts workers by importing the user's script, so that the script allows it."""
    context: Any = loader.multiprocessing_context or multiprocessing
    return loader.num_workers > 0 and context.get_start_method(allow_none=True) != "fork"


def _loader(trainer: Trainer, ask: Callable[[Any], Any], any_items: bool = False) -> Any:
    """The validation loader, the first if there are several; None if there is none.

    Args:
        trainer: The trainer, which creates its loaders in the first epoch with a validation.
        ask: Calls the hook `val_dataloader` if there are no loaders yet.
        any_items: Whether the training loader will do if there is no validation loader.
    """
    loaders = trainer.val_dataloaders
    if loaders is None and trainer.enable_validation:
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        loaders = ask(source) if source.is_module() else source.instance
    if loaders is None and any_items:
        loaders = trainer.train_dataloader
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders


def _loaders_of_hook(source: Any) -> Any:
    loaders = getattr(source.instance, source.name)()
    _not_finalised.append(loaders)
    return loaders


def _loaders_of_copied_hook(source: Any) -> Any:
    """Call the hook on a copy, as it may count calls or draw random numbers."""
    twin = Twin(lambda twin, value: twin.borrowed(value) if value is source.instance else None)
    with preserved_random_state():
        return getattr(twin.copy(source.instance), source.name)()


def _all_names(loader: Any) -> list[str] | None:
    data = getattr(loader, "dataset", None)
    while data is not None:
        if (names := _names(data)) is not None:
            return names
        parts = getattr(data, "datasets", None)
        data = parts[0] if isinstance(parts, list | tuple) and parts else getattr(data, "dataset", None)
    return None


def _names(data: Any) -> list[str] | None:
    """Class names from torchvision's `classes` or `class_to_idx`, or from Hugging Face's features."""
    features = getattr(data, "features", None)
    columns = features.values() if isinstance(features, Mapping) else ()
    attributes = [getattr(data, "classes", None), getattr(data, "class_to_idx", None)]
    for names in [*attributes, *(getattr(column, "names", None) for column in columns)]:
        if isinstance(names, list | tuple):
            return list(map(str, names))
        if isinstance(names, Mapping) and all(index in names.values() for index in range(len(names))):
            return [str(name) for name in sorted(names, key=names.__getitem__)]
    return None
