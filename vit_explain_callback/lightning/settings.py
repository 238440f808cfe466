"""The options of the callback, checked and grouped by what uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vit_explain_callback.lightning.batches import images_and_labels
from vit_explain_callback.methods.map_function import AnyMethod, check_removal, check_vit_options, of_attention
from vit_explain_callback.methods.names import resolve_methods
from vit_explain_callback.metrics.drift import DriftMetric, resolve_metrics
from vit_explain_callback.options.images import check_images
from vit_explain_callback.options.model import ViTOptions
from vit_explain_callback.options.rules import (
    CLASS_NAMES,
    COUNT,
    FLAG,
    METHODS,
    METRICS,
    NONE,
    NORMALISATION,
    ON_ERROR,
    REGIONS,
    TARGET,
    checked_options,
    integer,
    one_of,
    rules_of,
)
from vit_explain_callback.tracking.errors import OnError
from vit_explain_callback.tracking.probe import check_regions
from vit_explain_callback.tracking.settings import Checks, Detail
from vit_explain_callback.vit.labels import Task


@dataclass(frozen=True)
class Schedule:
    """When snapshots are taken: with each validation, every n epochs, or every n optimiser steps.

    Raises:
        ValueError: If both or neither schedule is set.
    """

    every_n_epochs: Annotated[int | Literal["auto"] | None, COUNT | one_of("auto") | NONE]
    every_n_steps: Annotated[int | None, COUNT | NONE]

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

    num_shown: Annotated[int, COUNT]
    class_names: Annotated[Sequence[str] | None, CLASS_NAMES]
    normalisation: Annotated[tuple[Sequence[float], Sequence[float]] | None, NORMALISATION]

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

    task: Annotated[Task | None, one_of("classification", "multilabel", "regression") | NONE]
    batch_size: Annotated[int | None, COUNT | NONE]


MODEL_OPTIONS = tuple(rules_of(CallbackModelOptions))


@dataclass(frozen=True)
class Settings:
    """The options of `ViTExplainCallback`, which documents them; `images` are the user's, with labels, if any."""

    schedule: Schedule
    display: Display
    model: CallbackModelOptions
    checks: Checks
    detail: Detail
    images: tuple[Tensor, Tensor | None] | None
    methods: Annotated[tuple[AnyMethod, ...], METHODS]
    num_images: Annotated[int, integer(1, 100_000)]
    regions: Annotated[Mapping[str, Tensor], REGIONS]
    target: Annotated[Literal["label", "prediction"] | int, TARGET]
    metrics: Annotated[tuple[DriftMetric, ...], METRICS]
    save_maps: Annotated[bool, FLAG]
    on_error: Annotated[OnError, ON_ERROR]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """Check options as the user passed them.

        Raises:
            TypeError: If an option is of the wrong type.
            ValueError: If an option is outside its range, or two contradict each other.
        """

        def of(kind: Any) -> Any:
            rules = rules_of(kind)
            return checked_options({name: options[name] for name in rules}, rules)

        values, images = of(cls), _checked_images(options["images"])
        values |= {"methods": resolve_methods(values["methods"]), "metrics": resolve_metrics(values["metrics"])}
        values |= {"checks": Checks.of("checks", options["checks"]), "detail": Detail.of("detail", options["detail"])}
        values["regions"] = values["regions"] or {}
        model: CallbackModelOptions = of(CallbackModelOptions)
        schedule, display = Schedule(**of(Schedule)), Display(**of(Display))
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
