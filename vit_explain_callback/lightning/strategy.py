"""What of a LightningModule is explained, and how all processes of a run do it together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.lightning._compat import FSDPStrategy, LightningModule, Trainer
from vit_explain_callback.metrics.faithfulness import (
    Removal,
    Remover,
    mean_colour,
    random_maps,
    symmetric_relevance_gain,
)
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.snapshot import Checks
from vit_explain_callback.vit.adapter import LogitsOf
from vit_explain_callback.vit.timm import find_vit


def explained_module(pl_module: LightningModule, vit: str | None, forward: LogitsOf | None) -> nn.Module:
    """What turns images into logits: the LightningModule if it can, else the ViT itself.

    Raises:
        ValueError: If neither can.
    """
    if forward is not None or type(pl_module).forward is not LightningModule.forward:
        return pl_module
    found = find_vit(pl_module, vit)
    if found is pl_module:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to define `forward(images)`, returning logits, or `vit=` to name "
            "the attribute that holds its model, but got neither."
        )
    return found


def forward_of(trainer: Trainer) -> LogitsOf | None:
    """How the LightningModule is called by a trainer whose strategy needs more than that, else None."""
    if not isinstance(trainer.strategy, FSDPStrategy):
        return None
    # Parameters outside of every wrapped submodule are gathered by the outermost wrapper alone.
    outermost = trainer.strategy.model

    def forward(_: nn.Module, images: Tensor) -> Any:
        assert outermost is not None
        return outermost(images)

    return forward


def explain_together(
    ranks: Ranks,
    explainer: Explainer,
    images: Tensor,
    target: int | Tensor | None,
    batch_size: int | None,
    block_statistics: bool = False,
) -> Explanation:
    """Explain images, each process its share; every process gets the whole explanation, on the CPU.

    Raises:
        Exception: What the explainer raised on any of them.
    """
    share = ranks.share(len(images))
    own_target = target[share] if isinstance(target, Tensor) else target

    def explain_share() -> Explanation | None:
        own = images[share]
        # Without the images: every process has them already.
        explained = explainer(own, own_target, batch_size, block_statistics) if len(own) else None
        return explained and replace(explained, images=None).cpu()

    parts = [part for part in ranks.together(explain_share) if part is not None]
    return Explanation.joined(parts) if ranks.divided else parts[0]


def check_together(
    ranks: Ranks,
    explainer: Explainer,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor,
    batch_size: int | None,
    removal: Removal = "mean_colour",
) -> Checks:
    """Explain the mirrored images and measure the faithfulness of `maps`, each process its share.

    Raises:
        Exception: What the model raised on any of them.
    """
    mirrored = explain_together(ranks, explainer, images.flip(-1), target, batch_size).maps
    grid = next(iter(maps.values())).shape[1:]
    ordered = {**maps, "random": random_maps(len(images), (grid[0], grid[1]))}
    share = ranks.share(len(images))

    def measure_share() -> dict[str, Tensor]:
        own = {name: order[share] for name, order in ordered.items()}
        if removal == "tokens":
            remove: Remover = partial(explainer.logits_without, batch_size=batch_size)
        else:
            remove = mean_colour(partial(explainer.logits, batch_size=batch_size))
        return symmetric_relevance_gain(remove, images[share], own, target[share]) if len(images[share]) else {}

    parts = [part for part in ranks.together(measure_share) if part]
    parts = parts if ranks.divided else parts[:1]
    gains = {name: torch.cat([part[name] for part in parts]) for name in ordered}
    return Checks({name: found.flip(-1) for name, found in mirrored.items()}, gains)
