"""Faithfulness of maps to the model: does taking away what they mark take away the prediction?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_explain_callback.metrics.maps import is_degenerate
from vit_explain_callback.metrics.probability import class_probabilities

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


Removal = Literal["mean_colour", "tokens"]
Remover: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Gives logits (B, C) for images (B, C, H, W) without some patches, as many of each: (B, grid_h, grid_w) boolean."""


def symmetric_relevance_gain(
    remove: Remover,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor,
    shares: Sequence[float] = SHARES,
    multilabel: bool = False,
) -> dict[str, Tensor]:
    """Symmetric relevance gain of maps (Blücher et al. 2024, arXiv:2401.06654).

    SRG = meanₖ [p(image without its k least relevant patches) − p(image without its k most relevant patches)], with p
    the probability of the target and k running over `shares` of the patches. It lies in [-1, 1]; a random order gives
    about 0, and more is more faithful.

    The order is that of the values with their sign: a patch that speaks against the target is less relevant than one
    that does not matter.

    It takes 2 · len(shares) forward passes of each image for every entry of `maps`: 10 by default.

    Args:
        remove: How patches are taken away: `mean_colour(model)`, or `Explainer.logits_without`, which drops tokens.
        images: (B, C, H, W).
        maps: Relevance by name, (B, grid_h, grid_w); `random_maps` are the control.
        target: (B,) classes.
        shares: Shares of the patches to take away, in (0, 1).
        multilabel: Whether p is the sigmoid of the target's own logit.

    Returns:
        (B,) by name, in float64 on the CPU; NaN where a map is degenerate.
    """
    gains: dict[str, Tensor] = {}
    for name, relevance in maps.items():
        grid = (relevance.shape[1], relevance.shape[2])
        # Rank of each patch, 0 the least relevant; ties in the order of the patches.
        ranks = relevance.cpu().flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        total = torch.zeros(len(images), dtype=torch.float64)
        for count in removed_counts(ranks.shape[1], shares):
            for sign, removed in ((1, ranks < count), (-1, ranks >= ranks.shape[1] - count)):
                logits = remove(images, removed.view(-1, *grid).to(images.device)).cpu()
                total += sign * class_probabilities(logits, multilabel).gather(1, target.cpu()[:, None])[:, 0]
        gains[name] = torch.where(is_degenerate(relevance.cpu()), torch.nan, total / len(shares))
    return gains


def removed_counts(patches: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Number of patches to remove, of `patches`, for each share."""
    return [max(1, round(share * patches)) for share in shares]


def mean_colour(predict: Callable[[Tensor], Tensor]) -> Remover:
    """Takes patches away by painting them in the mean colour of their image; for any model."""

    def remove(images: Tensor, removed: Tensor) -> Tensor:
        pixels = F.interpolate(removed[:, None].float(), images.shape[2:], mode="nearest-exact") > 0
        return predict(torch.where(pixels, images.mean(dim=(2, 3), keepdim=True), images))

    return remove


def random_maps(count: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """(count, grid_h, grid_w) maps that order the patches at random, the same in every call."""
    return torch.rand(count, *grid, generator=torch.Generator().manual_seed(seed))
