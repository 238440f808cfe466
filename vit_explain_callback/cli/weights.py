"""Read weights from a timm file, a Lightning checkpoint, or any other state dictionary."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the keys and the order of timm
_TRAINER_FILE = "model.safetensors"  # in a folder of the transformers Trainer


@dataclass(frozen=True)
class Weights:
    """The tensors of a file.

    Attributes:
        path: The file.
        tensors: Tensors by name.
        step: Optimiser steps at the time of writing, if the file states them, as Lightning's checkpoints do.
        prefix: Prefix of the model's tensor names, for a file of several models; None: the file holds one model.
    """

    path: Path
    tensors: dict[str, Tensor]
    step: int | None
    prefix: str | None = None

    @classmethod
    def read(cls, path: Path, prefix: str | None = None) -> Weights:
        """Read a file that timm or Lightning can read, without running any code in it.

        Args:
            path: A file named `.safetensors`, a file of `torch.save` under any other name, or a folder of the
                transformers Trainer.
            prefix: Prefix of the model's tensor names, such as `student`; needed for a file of several models.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it cannot be read as weights.
        """
        folder, path = path, path / _TRAINER_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            content = load_file(path) if path.suffix.lower() == ".safetensors" else _load_pickle(path)
            return cls(path, _state_dict(content), _step(content if path == folder else _trainer_state(folder)), prefix)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as weights: {error}") from error

    def converted_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Convert the tensors to the names and shapes of `model`, as far as timm can.

        A prefix that all names in the file share, as in a LightningModule, is removed.

        Raises:
            ValueError: If the file holds several such models and `prefix` selects none, or if timm cannot convert it.
        """
        model_tensors = model.state_dict()
        name = type(model).__name__
        prefix = self._only_prefix(model_tensors, name) if self.prefix is None else self._stated_prefix(model_tensors)
        state = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if adapt is None:
            return state
        try:
            converted: dict[str, Tensor] = adapt(state, model)
        except Exception as error:
            raise ValueError(f"{self.path} does not fit {name}: {error}") from error
        return converted

    def _prefixes(self, model_tensors: Mapping[str, Tensor]) -> list[str]:
        """List the prefixes under which this file holds one of the model's longest names."""
        last = max(model_tensors, key=lambda name: name.count("."))  # the most specific name
        return sorted({name.removesuffix(last) for name in self.tensors if name.endswith(last)} | {""})

    def _only_prefix(self, model_tensors: Mapping[str, Tensor], model: str) -> str:
        prefixes = self._prefixes(model_tensors)
        names_by_prefix = {
            prefix: [name for name in model_tensors if prefix + name in self.tensors] for prefix in prefixes
        }
        fitting = {
            prefix: [name for name in names if self.tensors[prefix + name].shape == model_tensors[name].shape]
            for prefix, names in names_by_prefix.items()
        }
        best = max(prefixes, key=lambda prefix: (len(fitting[prefix]), len(names_by_prefix[prefix])))
        rivals = [prefix for prefix in prefixes if prefix != best and len(fitting[prefix]) >= len(model_tensors) / 2]
        others = [prefix for prefix in rivals if not self._has_equal_tensors(names_by_prefix[best], best, prefix)]
        if others:
            names = " and ".join(repr(prefix) for prefix in sorted([best, *others]))
            raise ValueError(
                f"Expected {self.path} to hold one {model}, but it holds {1 + len(others)}, whose names begin with "
                f"{names}: choose one, as in --prefix {next(filter(None, [best, *others])).rstrip('.')}."
            )
        return best

    def _has_equal_tensors(self, names: list[str], one: str, other: str) -> bool:
        """Whether two prefixes hold equal tensors, as for one model under two names."""
        return all(
            other + name in self.tensors and torch.equal(self.tensors[one + name], self.tensors[other + name])
            for name in names
        )

    def _stated_prefix(self, model_tensors: Mapping[str, Tensor]) -> str:
        prefix = f"{self.prefix}." if self.prefix and not self.prefix.endswith(".") else self.prefix or ""
        if not any(name.startswith(prefix) for name in self.tensors):
            prefixes = (
                ", ".join(each.rstrip(".") for each in self._prefixes(model_tensors) if each)
                or "none before such a model"
            )
            raise ValueError(
                f"Expected `prefix` to begin names in {self.path}, but got {self.prefix!r}: it holds {prefixes}."
            )
        return prefix

    def load_into(self, model: nn.Module) -> list[str]:
        """Load the tensors that fit, and return the names of the model's tensors that were not loaded.

        Position embeddings are resized as in timm; tensors of another shape, such as a classifier for other classes,
        are skipped.

        Raises:
            ValueError: If nothing fits.
        """
        model_tensors = model.state_dict()
        state = self.converted_for(model)
        fitting = {
            name: value
            for name, value in state.items()
            if name in model_tensors and value.shape == model_tensors[name].shape
        }
        if not fitting:
            raise ValueError(f"{self.path} holds no tensor that fits {type(model).__name__}.")
        model.load_state_dict(fitting, strict=False)
        return [name for name in model_tensors if name not in fitting]


def model_with_weights(name: str, weights: Weights, **options: Any) -> Any:
    """Create a timm model with these weights and as many classes as they have.

    Args:
        name: Name of the model in timm.
        weights: The weights.
        options: Options of `timm.create_model`.

    Raises:
        ValueError: If the weights do not fit or do not cover the whole model.
    """
    model: Any = timm.create_model(name, **options)
    classifier = f"{model.pretrained_cfg['classifier']}.weight"
    tensors = weights.converted_for(model)
    if classifier in tensors:
        model.reset_classifier(len(tensors[classifier]))
    missing = [left for left in weights.load_into(model) if not left.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{weights.path} does not hold all of {name}; {', '.join(missing[:5])} … are missing.")
    return model


def _load_pickle(path: Path) -> object:
    """Read a file of `torch.save` that contains only tensors and plain values.

    Raises:
        ValueError: If it contains anything else.
    """
    if tarfile.is_tarfile(path):  # refused by torch since 2.6, after CVE-2025-32434
        raise ValueError("it has torch's format of 2016; load and save it again with torch")
    try:
        # Training checkpoints of timm hold their options in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError("it is not a file of torch.save, or it is broken") from error
        raise ValueError(
            f"it holds more than tensors ({refused[1]}), which may run code, so it is not loaded. If you trust its "
            "source, load it in Python and save the state dictionary alone: torch.save(state_dict, FILE)"
        ) from error


def _state_dict(content: object) -> dict[str, Tensor]:
    """Extract the state dictionary from a checkpoint, without the prefixes that wrappers add to its names."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected tensors by name, but it holds a {type(content).__name__}")
    state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    named = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not named:
        raise ValueError("it holds no tensors by name")
    cleaned: dict[str, Tensor] = timm.models.clean_state_dict(named)
    return cleaned


def _trainer_state(folder: Path) -> object:
    """Read the state of the transformers Trainer from a folder that it saved; None if there is none."""
    file = folder / "trainer_state.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _step(content: object) -> int | None:
    step = content.get("global_step") if isinstance(content, Mapping) else None
    return step if isinstance(step, int) and step >= 0 else None
