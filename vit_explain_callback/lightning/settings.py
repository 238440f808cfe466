"""Settings of the callback, grouped by what uses them, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vit_explain_callback._checks import check_counts, check_images, check_vit_options, class_index
from vit_explain_callback.explainer import ModelOptions
from vit_explain_callback.methods.map_function import AnyMethod, of_attention
from vit_explain_callback.metrics.drift import DriftMetric
from vit_explain_callback.tracking.checks import RemovalOrAuto
from vit_explain_callback.tracking.guard import OnError
from vit_explain_callback.tracking.probe import check_regions
from vit_explain_callback.tracking.scalars import Detail
from vit_explain_callback.vit.losses import Task


@dataclass(frozen=True)
class Schedule:
    """When snapshots are taken: with each validation, or by epochs or optimiser steps.

    Raises:
        ValueError: If not exactly one is given, or if it is below 1.
    """

    every_n_epochs: int | Literal["auto"] | None
    every_n_steps: int | None

    def __post_init__(self) -> None:
        epochs = None if self.every_n_epochs == "auto" else self.every_n_epochs
        if self.every_n_epochs is not None and self.every_n_steps is not None and epochs is not None:
            raise ValueError("Expected one schedule, `every_n_epochs` or `every_n_steps`, but got both.")
        if self.every_n_epochs is None and self.every_n_steps is None:
            raise ValueError("Expected one schedule, `every_n_epochs` or `every_n_steps`, but got neither.")
        check_counts(every_n_epochs=epochs, every_n_steps=self.every_n_steps)

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
        ValueError: If one of `mean` and `std` is given without the other, if `num_shown` is below 1, or if
            `max_pictures_mb` is not above 0.
    """

    num_shown: int
    class_names: Sequence[str] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    margin_charts: bool
    max_pictures_mb: float

    def __post_init__(self) -> None:
        check_counts(num_shown=self.num_shown)
        if not self.max_pictures_mb > 0:
            raise ValueError(f"Expected `max_pictures_mb` above 0, but got {self.max_pictures_mb!r}.")
        if (self.mean is None) != (self.std is None):
            raise ValueError("Expected both `mean` and `std`, or neither, but got one of them.")

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and standard deviation to undo, if given."""
        return (self.mean, self.std) if self.mean and self.std else None


@dataclass(frozen=True)
class Settings:
    """The options of `ViTExplainCallback`, which documents them; `given` holds the images of the user, if any.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is outside its range, or two contradict each other.
    """

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

    @property
    def needs_vit(self) -> bool:
        """Whether there is a method that needs the attention of a ViT."""
        return bool(of_attention(self.methods))

    def __post_init__(self) -> None:
        check_counts(
            check_every_n_snapshots=self.check_every_n_snapshots,
            num_images=self.num_images,
            batch_size=self.batch_size,
        )
        check_vit_options(self.methods, self.model)
        if isinstance(self.target, str):
            _check_word("target", self.target, ("label", "prediction"), " or a class index")
        else:
            object.__setattr__(self, "target", _class_index(self.target))
        if self.task is not None:
            _check_word("task", self.task, ("classification", "multilabel", "regression"))
        _check_word("detail", self.detail, ("brief", "full"))
        _check_word("on_error", self.on_error, ("warn", "raise"))
        _check_word("removal", self.removal, ("mean_colour", "tokens", "auto"))
        for name, masks in self.regions.items():
            if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim != 3:
                raise TypeError(
                    f"Expected `regions[{name!r}]` to be a boolean tensor (B, H, W), but got {masks!r:.80}."
                )
        if self.given is not None:
            check_images(self.given[0])
            check_regions(self.regions, len(self.given[0]))


def _class_index(target: object) -> int:
    index = class_index(target)
    if index is None:
        raise TypeError(f"Expected `target` to be 'label', 'prediction' or a class index, but got {target!r:.80}.")
    if index < 0:
        raise ValueError(f"Expected `target` of at least 0, but got {index}.")
    return index


def _check_word(name: str, word: Any, words: Sequence[str], more: str = "") -> None:
    if word not in words:
        known = ", ".join(map(repr, words)) if more else " or ".join(map(repr, words))
        raise ValueError(f"Expected `{name}` to be {known}{more}, but got {word!r}.")
