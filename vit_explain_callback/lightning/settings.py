"""Settings of the callback, grouped by what uses them, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from vit_explain_callback.explainer import ModelOptions
from vit_explain_callback.lightning.batches import images_and_labels
from vit_explain_callback.methods.map_function import AnyMethod, check_removal, check_vit_options, of_attention
from vit_explain_callback.methods.names import resolve_methods
from vit_explain_callback.metrics.drift import DriftMetric, resolve_metrics
from vit_explain_callback.options.images import check_images
from vit_explain_callback.options.rules import checked_options
from vit_explain_callback.tracking.errors import OnError
from vit_explain_callback.tracking.probe import check_regions
from vit_explain_callback.tracking.reliability import RemovalOrAuto
from vit_explain_callback.tracking.scalars import Detail
from vit_explain_callback.vit.labels import Task


@dataclass(frozen=True)
class Schedule:
    """When snapshots are taken: with each validation, or by epochs or optimiser steps.

    Raises:
        ValueError: If not exactly one is given.
    """

    every_n_epochs: int | Literal["auto"] | None
    every_n_steps: int | None

    def __post_init__(self) -> None:
        if isinstance(self.every_n_epochs, int) and self.every_n_steps is not None:
            raise ValueError("Expected one schedule, `every_n_epochs` or `every_n_steps`, but got both.")
        if self.every_n_epochs is None and self.every_n_steps is None:
            raise ValueError("Expected one schedule, `every_n_epochs` or `every_n_steps`, but got neither.")

    def __str__(self) -> str:
        if self.every_n_steps is not None:
            return f"every {self.every_n_steps} steps"
        return "with each validation" if self.with_validation else f"every {self.every_n_epochs} epochs"

    @property
    def with_validation(self) -> bool:
        """Whether a snapshot is due with each validation, and at the end of an epoch that has none."""
        return self.every_n_epochs == "auto" and self.every_n_steps is None

    def steps_passed(self, last: int, step: int) -> bool:
        """Whether a snapshot by steps was due after step `last` and until `step`."""
        return self.every_n_steps is not None and step // self.every_n_steps > last // self.every_n_steps

    def epochs_passed(self, epochs: int) -> bool:
        """Whether a snapshot by epochs is due after so many."""
        return isinstance(self.every_n_epochs, int) and self.every_n_steps is None and epochs % self.every_n_epochs == 0


@dataclass(frozen=True)
class Display:
    """How images are shown.

    Raises:
        ValueError: If one of `mean` and `std` is given without the other, or for another number of channels.
    """

    num_shown: int
    class_names: Sequence[str] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    margin_charts: bool
    max_pictures_mb: float

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("Expected both `mean` and `std`, or neither, but got one of them.")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(
                f"Expected `mean` and `std` for the same channels, but got {len(self.mean)} and {len(self.std)} values."
            )

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and standard deviation to undo, if given."""
        return (self.mean, self.std) if self.mean and self.std else None

    def check_channels(self, channels: int) -> None:
        """Refuse a `mean` and `std` of other images than those that are explained.

        Raises:
            ValueError: If they have not one value for each of the channels of these.
        """
        if self.mean is not None and len(self.mean) != channels:
            raise ValueError(
                f"Expected `mean` and `std` with one value for each of the {channels} channels of the images, but got "
                f"{len(self.mean)}."
            )


@dataclass(frozen=True)
class Settings:
    """The options of `ViTExplainCallback`, which documents them; `given` holds the images of the user, if any."""

    methods: tuple[AnyMethod, ...]
    schedule: Schedule
    display: Display
    model: ModelOptions
    check_every_n_snapshots: int | None
    removal: RemovalOrAuto
    num_images: int
    given: tuple[Tensor, Tensor | None] | None
    regions: Mapping[str, Tensor]
    target: Literal["label", "prediction"] | int
    block_statistics: bool
    metrics: tuple[DriftMetric, ...]
    batch_size: int | None
    save_maps: bool
    report: bool
    detail: Detail
    on_error: OnError
    task: Task | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """The settings that options ask for, each as the user gave it.

        Raises:
            TypeError: If an option is of the wrong type.
            ValueError: If an option is outside its range, or two contradict each other.
        """
        given = _given(options["images"])
        read = checked_options({name: value for name, value in options.items() if name != "images"})
        read |= {"methods": resolve_methods(read["methods"]), "metrics": resolve_metrics(read["metrics"])}
        read["regions"] = read["regions"] or {}

        def taken(kind: Any) -> dict[str, Any]:
            return {name: read.pop(name) for name in [*read] if name in kind.__annotations__}

        # A `ModelOptions` has names of classes too, which are shown and not explained.
        schedule, display = Schedule(**taken(Schedule)), Display(**taken(Display))
        model = cast(ModelOptions, taken(ModelOptions))
        settings = cls(schedule=schedule, display=display, model=model, given=given, **read)
        check_vit_options(settings.methods, model)
        check_removal(settings.removal, settings.methods)
        if given is not None:
            check_regions(settings.regions, len(given[0]))
        return settings

    @property
    def needs_vit(self) -> bool:
        """Whether there is a method that needs the attention of a ViT."""
        return bool(of_attention(self.methods))


def _given(images: object) -> tuple[Tensor, Tensor | None] | None:
    """Images and labels that the user gives.

    Raises:
        TypeError: If they are something else.
        ValueError: If they are out of range, or there is not one label for each image.
    """
    if images is None:
        return None
    pair = list(images) if isinstance(images, list | tuple) else [images]
    if isinstance(images, Mapping):
        pair = _parts(images)
    if not 1 <= len(pair) <= 2 or not isinstance(pair[0], Tensor):
        got = f"a {type(images).__name__}" + (f" of {len(pair)}" if isinstance(images, list | tuple) else "")
        raise TypeError(f"Expected `images` to be a tensor (B, C, H, W) or a pair (images, labels), but got {got}.")
    check_images(pair[0])
    labels = pair[1] if len(pair) == 2 else None
    if labels is None:
        return images_and_labels(pair[0])
    labels = torch.from_numpy(labels) if isinstance(labels, np.ndarray) and labels.dtype.kind in "biuf" else labels
    if isinstance(labels, Tensor):
        labels = labels.long() if labels.dtype is torch.bool else None if labels.is_complex() else labels
    if isinstance(labels, Tensor | list | tuple) and len(labels) != len(pair[0]):
        got = f"{len(pair[0])} images but {len(labels)} labels"
        raise ValueError(f"Expected `images=(images, labels)` to hold one label for each image, but got {got}.")
    found = images_and_labels((pair[0], labels))
    if found[1] is None:
        raise TypeError(
            "Expected the labels of `images=(images, labels)` to be class indices (B,), but got "
            f"{type(pair[1]).__name__} of other values."
        )
    return found


def _parts(images: Mapping[Any, Any]) -> list[Any]:
    """Images and labels of a mapping; nothing where it has none."""
    try:
        return list(images_and_labels(images))
    except (TypeError, ValueError):
        return []
