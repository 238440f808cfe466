"""What the user asks of the callback, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vit_explain_callback._checks import check_counts, check_images
from vit_explain_callback.methods.base import Method
from vit_explain_callback.metrics.faithfulness import Removal
from vit_explain_callback.tracking.probe import ProbeBatch
from vit_explain_callback.vit.adapter import LogitsOf


@dataclass(frozen=True)
class Settings:
    """The options of `ViTExplainCallback`, which documents them.

    `every_n_epochs` or `every_n_steps` is None, and `given` holds the images of the user, if any.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is outside its range, or two contradict each other.
    """

    methods: tuple[Method, ...]
    every_n_epochs: int | None
    every_n_steps: int | None
    check_every_n_snapshots: int | None
    removal: Removal
    num_images: int
    given: ProbeBatch | None
    regions: Mapping[str, Tensor]
    num_shown: int
    target: Literal["label", "prediction"] | int
    block_statistics: bool
    vit: str | None
    class_names: Sequence[str] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    forward: LogitsOf | None
    prefix_tokens: int | None
    grid_size: tuple[int, int] | None
    batch_size: int | None
    save_maps: bool
    margin_charts: bool
    on_error: Literal["warn", "raise"]

    def __post_init__(self) -> None:
        if (self.every_n_epochs is None) == (self.every_n_steps is None):
            raise ValueError(
                "Expected one schedule, `every_n_epochs` or `every_n_steps`, but got "
                f"{'neither' if self.every_n_steps is None else 'both'}."
            )
        for name in (
            "every_n_epochs",
            "every_n_steps",
            "check_every_n_snapshots",
            "num_images",
            "num_shown",
            "batch_size",
        ):
            check_counts(**{name: getattr(self, name)})
        if isinstance(self.target, str) and self.target not in ("label", "prediction"):
            raise ValueError(
                f"Expected `target` to be 'label', 'prediction' or a class index, but got {self.target!r}."
            )
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"Expected `on_error` to be 'warn' or 'raise', but got {self.on_error!r}.")
        if self.removal not in ("mean_colour", "tokens"):
            raise ValueError(f"Expected `removal` to be 'mean_colour' or 'tokens', but got {self.removal!r}.")
        if (self.mean is None) != (self.std is None):
            raise ValueError("Expected both `mean` and `std`, or neither, but got one of them.")
        for name, masks in self.regions.items():
            if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim != 3:
                raise TypeError(
                    f"Expected `regions[{name!r}]` to be a boolean tensor (B, H, W), but got {masks!r:.80}."
                )
        if self.given is not None:
            check_images(self.given.images)
            self.check_regions(len(self.given))

    def check_regions(self, images: int) -> None:
        """Refuse regions that do not fit a number of probe images.

        Raises:
            ValueError: If a region has more masks than that, or fewer.
        """
        for name, masks in self.regions.items():
            if len(masks) != images:
                raise ValueError(
                    f"Expected `regions[{name!r}]` to hold one mask for each of the {images} probe images, but got "
                    f"{len(masks)}."
                )
