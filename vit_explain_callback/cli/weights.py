"""Weights from a file: of timm, of a Lightning checkpoint, or any state dictionary that holds a model's tensors."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weights:
    """The tensors of a file.

    Attributes:
        path: The file.
        tensors: By name.
        step: Optimiser steps taken before it was written, if it says so, as Lightning's checkpoints do.
    """

    path: Path
    tensors: dict[str, Tensor]
    step: int | None

    @classmethod
    def read(cls, path: Path) -> Weights:
        """Read any file that timm can read, without running code that it might hold.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is none of these files.
        """
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            if path.suffix != ".ckpt":
                return cls(path, timm.models.load_state_dict(str(path)), None)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            return cls(path, checkpoint["state_dict"], checkpoint.get("global_step"))
        except Exception as error:
            raise ValueError(f"{path} cannot be read as weights: {error}") from error

    def of(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors by the names and in the shapes that `model` has for them, as far as timm can convert them.

        A prefix that the file gives to all of the model's names, as a LightningModule does, is taken off.
        """
        own = model.state_dict()
        last = max(own, key=lambda name: name.count("."))  # a name that says much
        prefixes = {name.removesuffix(last) for name in self.tensors if name.endswith(last)} | {""}
        prefix = max(sorted(prefixes), key=lambda prefix: sum(prefix + name in self.tensors for name in own))
        state = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        return adapt(state, model) if adapt else state

    def load_into(self, model: nn.Module) -> list[str]:
        """Load what fits, and give the names of the model's tensors that were left as they were.

        Position embeddings are resized as timm does; tensors of another shape, as of a classifier for other classes,
        are left.

        Raises:
            ValueError: If nothing fits.
        """
        own = model.state_dict()
        state = self.of(model)
        fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
        if not fitting:
            raise ValueError(f"{self.path} holds nothing that fits {type(model).__name__}.")
        model.load_state_dict(fitting, strict=False)
        return [name for name in own if name not in fitting]


def with_weights(name: str, weights: Weights, **options: Any) -> Any:
    """A timm model with a classifier of as many classes as the weights have one for.

    Args:
        name: Of the model.
        weights: Its weights.
        options: For `timm.create_model`.

    Raises:
        ValueError: If the weights do not fit, the classifier included.
    """
    model: Any = timm.create_model(name, **options)
    classifier = f"{model.pretrained_cfg['classifier']}.weight"
    tensors = weights.of(model)
    if classifier in tensors:
        model.reset_classifier(len(tensors[classifier]))
    fresh = [left for left in weights.load_into(model) if not left.endswith("num_batches_tracked")]
    if fresh:
        raise ValueError(f"{weights.path} does not hold all of {name}; {', '.join(fresh[:5])} … are missing.")
    return model
