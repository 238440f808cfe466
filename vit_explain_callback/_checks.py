"""What is refused before a model is run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vit_explain_callback.methods.base import Method
from vit_explain_callback.vit.timm import num_classes


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of normalised images.

    Raises:
        TypeError: If `images` is not a floating-point tensor.
        ValueError: If it is not (B, C, H, W) with B >= 1, holds NaN or Inf, or looks like bytes.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"Expected `images` to be a floating-point tensor, normalised for the model, but got {got}.")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"Expected `images` of shape (B, C, H, W) with B >= 1, but got {tuple(images.shape)}.")
    if not images.isfinite().all():
        raise ValueError("Expected `images` to be finite, but they hold NaN or Inf.")
    if images.abs().max() > 50:
        raise ValueError(
            f"Expected `images` normalised as the model expects, but got values up to {images.abs().max():.0f}, as of "
            "bytes. Divide by 255, subtract the mean and divide by the standard deviation."
        )


def check_classifier(vit: nn.Module) -> None:
    """Refuse a ViT that returns features, where its output is to be taken for logits.

    Raises:
        ValueError: If it has no classifier.
    """
    if num_classes(vit) == 0:
        raise ValueError(
            f"Expected logits from {type(vit).__name__}, but it has no classifier (`num_classes` is 0). Explain the "
            "module whose forward turns images into logits, or give the ViT one with `reset_classifier`."
        )


def check_layers(methods: Sequence[Method], blocks: int) -> None:
    """Refuse methods with an option that names a block which the model does not have.

    Raises:
        ValueError: If there is one.
    """
    for method in methods:
        method.layers(blocks)


def check_target(target: Tensor, classes: int) -> None:
    """Refuse classes that the model's head does not have.

    Raises:
        ValueError: If an entry of `target`, (B,), lies outside 0 … classes - 1.
    """
    if ((target < 0) | (target >= classes)).any():
        raise ValueError(
            f"Expected `target` classes in 0 … {classes - 1} (the model's logits), but got {target.tolist()}."
        )


def check_counts(**counts: int | None) -> None:
    """Refuse counts, by the name of their argument, that are not None and below 1.

    Raises:
        ValueError: If one is.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"Expected `{name}` of at least 1, but got {count}.")
