"""One project of somebody else, and what must come out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import pytorch_lightning as pl
import torch
from torch import Tensor

from tests.situations.project import LABELS, loader, pictures

NO_THREAD, RIGHT = "no thread", "right, and must stay so"
Images: TypeAlias = "Tensor | Sequence[Tensor]"


def logits_of_the_vit(module: Any, fed: Tensor) -> Tensor:
    return module.vit(fed)


@dataclass(frozen=True)
class Situation:
    """A project, and by hand what its own validation step does with each validation sample.

    Attributes:
        source: Public thread that tells of it.
        before: What happened with nothing configured.
        module: Makes the LightningModule.
        validation: Makes the validation loader.
        fed: Makes what the ViT gets of every validation sample, in the order of the data.
        labels: Label of every validation sample as the loss takes it, −1 where it takes none; None without classes.
        train: Makes the training loader; None: the validation loader's data are trained on as well.
        logits: From the module and what the ViT is fed to what the loss is computed of.
        starts: The rows that the head reads.
        kind: Whether the outputs are classes or numbers.
        images: Size of the probe batch.
        first_step: Optimiser steps before the baseline.
        says: What one message of the callback must match.
        trainer: Options of the Trainer.
        callback: Options of the callback: nothing, unless the thread's user would have to say it.
        tolerance: Relative error of the maps.
        dtype: Of the parameters.
    """

    source: str
    before: str
    module: Callable[[], pl.LightningModule]
    validation: Callable[[], Any] = loader
    fed: Callable[[], Images] = pictures
    labels: Sequence[int] | None = tuple(LABELS)
    train: Callable[[], Any] | None = None
    logits: Callable[[Any, Tensor], Tensor] = logits_of_the_vit
    starts: Literal["class", "patches"] = "class"
    kind: Literal["classes", "numbers"] = "classes"
    images: int = 16
    first_step: int = 0
    says: str | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callback: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3
    dtype: torch.dtype = torch.float32
