"""Refuse images and targets that cannot be explained, before a model is run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vit_explain_callback.options.rules import class_index
from vit_explain_callback.system.files import INTEGERS


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of normalised images.

    Raises:
        TypeError: If `images` is not a floating-point tensor.
        ValueError: If it is not (B, C, H, W) with B >= 1, holds NaN or Inf, or looks like bytes.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"Expected `images` to be a floating-point tensor, normalised for the model, but got {got}.")
    if images.layout is not torch.strided or images.is_meta:
        raise TypeError(
            f"Expected `images` to be a dense tensor with values, but got {images.layout} on {images.device}."
        )
    if images.ndim != 4 or images.numel() == 0:
        cure = (
            " Give the slices of a volume as channels, `images.flatten(1, 2)`, with "
            "`forward=lambda model, images: model(images.unflatten(1, (C, D)))` and `grid_size=` of their patches "
            "below one another."
        )
        raise ValueError(
            f"Expected `images` of shape (B, C, H, W) with B >= 1, but got {tuple(images.shape)}."
            f"{cure if images.ndim == 5 else ''}"
        )
    largest = max(abs(extreme.item()) for extreme in images.aminmax())
    if not math.isfinite(largest):
        raise ValueError("Expected `images` to be finite, but they hold NaN or Inf.")
    if largest > 50:
        raise ValueError(
            f"Expected `images` normalised as the model expects, but got values up to {largest:.0f}, as of bytes. "
            "Divide by 255, subtract the mean and divide by the standard deviation."
        )


def as_target(target: object, images: int) -> int | Tensor | None:
    """Convert a target to None, an int, or (B,) integers on any device.

    Raises:
        TypeError: If it is something else.
        ValueError: If there is not one for each image.
    """
    index = class_index(target)
    if target is None or index is not None:
        return index
    if not isinstance(target, Tensor) or target.dtype not in INTEGERS:
        raise TypeError(f"Expected `target` to be None, an int or an integer tensor, but got {target!r:.80}.")
    if target.shape != (images,):
        raise ValueError(f"Expected `target` of shape ({images},), one per image, but got {tuple(target.shape)}.")
    return target.long()
