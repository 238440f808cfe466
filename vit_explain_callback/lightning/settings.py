"""The options of the callback, checked and grouped by what uses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import numpy as np
import torch
from torch import Tensor

from vit_explain_callback.explainer import ViTOptions
from vit_explain_callback.lightning.batches import images_and_labels
from vit_explain_callback.methods.map_function import AnyMethod, check_removal, check_vit_options, of_attention
from vit_explain_callback.methods.names import resolve_methods
from vit_explain_callback.metrics.drift import DriftMetric, resolve_metrics
from vit_explain_callback.options.images import check_images
from vit_explain_callback.options.rules import checked_options
from vit_explain_callback.tracking.errors import OnError
from vit_explain_callback.tracking.probe import check_regions
from vit_explain_callback.tracking.settings import Checks, Detail
from vit_explain_callback.vit.losses import Task


@dataclass(frozen=True)
class Schedule:
    """When snapshots are taken: with each validation, every n epochs, or every n optimiser steps.

    Raises:
        ValueError: If both or neither schedule is set.
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
        """Whether a snapshot is due with each validation, and after an epoch without one."""
        return self.every_n_epochs == "auto" and self.every_n_steps is None

    def steps_passed(self, last: int, step: int) -> bool:
        """Whether a step schedule had a snapshot due after step `last`, up to `step`."""
        return self.every_n_steps is not None and step // self.every_n_steps > last // self.every_n_steps

    def epochs_passed(self, epochs: int) -> bool:
        """Whether an epoch schedule has a snapshot due after this many epochs."""
        return isinstance(self.every_n_epochs, int) and self.every_n_steps is None and epochs % self.every_n_epochs == 0


@dataclass(frozen=True)
class Display:
    """How images are shown."""

    num_shown: int
    class_names: Sequence[str] | None
    normalisation: tuple[Sequence[float], Sequence[float]] | None

    def check_channels(self, channels: int) -> None:
        """Refuse a normalisation of images with another number of channels.

        Raises:
            ValueError: If it does not have one mean and one standard deviation for each channel.
        """
        if self.normalisation is not None and len(self.normalisation[0]) != channels:
            raise ValueError(
                f"Expected `normalisation` with one value for each of the {channels} channels of the images, but got "
                f"{len(self.normalisation[0])}."
            )


class CallbackModelOptions(ViTOptions, total=False):
    """What a LightningModule does not say of itself; all of it can be left out.

    Attributes:
        task: What the outputs are, if not what the loss of the step says.
        batch_size: Images explained in one pass; None takes all at once.
    """

    task: Task | None
    batch_size: int | None


MODEL_OPTIONS = tuple(get_type_hints(CallbackModelOptions))
_OF_OTHER_TYPES = ("images", "checks", "detail")


@dataclass(frozen=True)
class Settings:
    """The options of `ViTExplainCallback`, which documents them; `images` are the user's, with labels, if any."""

    methods: tuple[AnyMethod, ...]
    schedule: Schedule
    display: Display
    model: CallbackModelOptions
    checks: Checks
    num_images: int
    images: tuple[Tensor, Tensor | None] | None
    regions: Mapping[str, Tensor]
    target: Literal["label", "prediction"] | int
    metrics: tuple[DriftMetric, ...]
    save_maps: bool
    detail: Detail
    on_error: OnError

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """Check options as the user passed them.

        Raises:
            TypeError: If an option is of the wrong type.
            ValueError: If an option is outside its range, or two contradict each other.
        """
        images = _checked_images(options["images"])
        values = checked_options({name: value for name, value in options.items() if name not in _OF_OTHER_TYPES})
        values |= {"methods": resolve_methods(values["methods"]), "metrics": resolve_metrics(values["metrics"])}
        values |= {"checks": Checks.of("checks", options["checks"]), "detail": Detail.of("detail", options["detail"])}
        values["regions"] = values["regions"] or {}

        def grouped(names: Iterable[str]) -> Any:
            return {name: values.pop(name) for name in [*values] if name in names}

        schedule = Schedule(**grouped(Schedule.__annotations__))
        display = Display(**grouped(Display.__annotations__))
        model: CallbackModelOptions = grouped(MODEL_OPTIONS)
        settings = cls(schedule=schedule, display=display, model=model, images=images, **values)
        check_vit_options(settings.methods, model)
        check_removal(settings.checks.removal, settings.methods)
        if images is not None:
            check_regions(settings.regions, len(images[0]))
        return settings

    @property
    def needs_vit(self) -> bool:
        """Whether a method needs the attention of a ViT."""
        return bool(of_attention(self.methods))


def _checked_images(images: object) -> tuple[Tensor, Tensor | None] | None:
    """The user's images and labels.

    Raises:
        TypeError: If they have the wrong type.
        ValueError: If they are out of range, or there is not one label for each image.
    """
    if images is None:
        return None
    pair = list(images) if isinstance(images, list | tuple) else [images]
    if isinstance(images, Mapping):
        pair = _pair_of(images)
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
    images_with_labels = images_and_labels((pair[0], labels))
    if images_with_labels[1] is None:
        raise TypeError(
            "Expected the labels of `images=(images, labels)` to be class indices (B,), but got "
            f"{type(pair[1]).__name__} of other values."
        )
    return images_with_labels


def _pair_of(images: Mapping[Any, Any]) -> list[Any]:
    """Images and labels of a mapping; empty if it has none."""
    try:
        return list(images_and_labels(images))
    except (TypeError, ValueError):
        return []
