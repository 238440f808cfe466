"""What the callback takes from a trainer's validation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from vit_explain_callback.lightning._compat import LightningModule, Trainer
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.probe import ProbeBatch, first_batch
from vit_explain_callback.vit.isolation import preserved_random_state


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
