"""What the callback takes from a trainer's validation data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from vit_explain_callback.lightning._compat import LightningModule, Trainer
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.vit.isolation import preserved_random_state

_IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")


@dataclass(frozen=True)
class ProbeBatch:
    """Images with their labels, on the CPU.

    Attributes:
        images: (B, C, H, W), as the model takes them.
        labels: (B,) class indices, or None where they are not known.
    """

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def from_batch(cls, batch: Any, num_images: int | None = None) -> ProbeBatch:
        """Take images and class labels out of a batch: a tensor, an (images, labels, …) pair or a mapping.

        Labels that are not one class index an image (soft labels, several labels, boxes) are left out; those of a
        one-logit head may be floats, 0 and 1.

        Raises:
            TypeError: If the batch is of another kind.
            ValueError: If a mapping has no image under a usual name, or the labels are not as many as the images.
        """
        images, labels = _images_and_labels(batch)
        if not isinstance(images, Tensor):
            raise TypeError(f"Expected a batch with its images as one tensor, but got {type(images).__name__}.")
        images = images.detach()[:num_images].to("cpu", copy=True)
        if isinstance(labels, Sequence) and all(isinstance(label, int) for label in labels):
            labels = torch.tensor(labels)
        if not isinstance(labels, Tensor) or labels.shape[1:] not in ((), (1,)) or (labels != labels.round()).any():
            return cls(images)
        labels = labels.detach()[:num_images].flatten().to("cpu", torch.int64, copy=True)
        if len(labels) != len(images):
            raise ValueError(f"Expected one label an image, but got {len(images)} images but {len(labels)} labels.")
        return cls(images, labels)


def first_batch(loader: Iterable[Any], num_images: int) -> Any:
    """The first `num_images` items of a loader's data, collated by the loader, whatever order it draws them in.

    A `DataLoader` is not iterated itself: its dataset is read in order, in this process, with the random streams put
    back afterwards, so that neither its workers nor its generators notice. Other iterables give their first batch.

    Raises:
        ValueError: If there is no data.
        RuntimeError: If reading it fails.
    """
    with preserved_random_state(seed=0):
        if isinstance(loader, DataLoader):
            size = None if loader.batch_size is None and loader.batch_sampler is None else num_images
            loader = DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn)
        try:
            for batch in loader:
                return batch
        except Exception as error:
            raise RuntimeError(f"Reading the probe images from the validation loader failed: {error!r}.") from error
    raise ValueError("Expected the validation loader to hold at least one batch, but it is empty.")


def _images_and_labels(batch: Any) -> tuple[Any, Any]:
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
        "Give the images yourself: `ViTExplainCallback(images=(images, labels))`."
    )


def collect_probe(trainer: Trainer, pl_module: LightningModule, num_images: int, ranks: Ranks) -> ProbeBatch:
    """The first `num_images` validation images as the model gets them; fewer, with a warning, if there are no more.

    The module's own transfer hooks, which may normalise, do what they do in validation. The first process collects, and
    gives the images to all.

    Raises:
        TypeError: If there are no images to be found in a batch.
        ValueError: If there are no images.
        RuntimeError: If reading them fails.
    """
    collected, *_ = ranks.together(lambda: _collect(trainer, pl_module, num_images) if ranks.rank == 0 else None)
    assert collected is not None
    return collected


def class_names(trainer: Trainer) -> Sequence[str] | None:
    """The `classes` of the validation data set, if it has them."""
    classes = getattr(getattr(_loader(trainer), "dataset", None), "classes", None)
    return classes if isinstance(classes, list | tuple) else None


def _loader(trainer: Trainer) -> Any:
    """The validation loader, the first if there are several; None if there is none."""
    loaders = trainer.val_dataloaders
    if loaders is None and trainer.enable_validation:  # Lightning makes them in the first epoch that is validated
        with preserved_random_state():
            loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, list | tuple) else loaders


def _collect(trainer: Trainer, pl_module: LightningModule, num_images: int) -> ProbeBatch:
    batch = first_batch(_loader(trainer), num_images)
    stage = trainer.state.stage
    try:
        trainer.validating = True
        with preserved_random_state(seed=0), torch.no_grad():
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
    finally:
        trainer.state.stage = stage
    probe = ProbeBatch.from_batch(batch, num_images)
    if len(probe) < num_images:
        rank_zero_warn(
            f"ViTExplainCallback: `num_images={num_images}`, but the validation set gave {len(probe)}; these are used."
        )
    return probe
