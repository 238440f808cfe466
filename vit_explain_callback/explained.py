"""What of a LightningModule is explained, and how all processes of a run do it together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vit_explain_callback._lightning import FSDPStrategy, LightningModule, Trainer
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.ranks import Ranks
from vit_explain_callback.subject import LogitsOf
from vit_explain_callback.vit import find_vit


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
    ranks: Ranks, explainer: Explainer, images: Tensor, target: int | Tensor | None, batch_size: int | None
) -> Explanation:
    """Explain images, each process its share; every process gets the whole explanation, on the CPU.

    Raises:
        Exception: What the explainer raised on any of them.
    """
    share = ranks.share(len(images))
    own_target = target[share] if isinstance(target, Tensor) else target

    def explain_share() -> Explanation | None:
        own = images[share]
        return explainer(own, own_target, batch_size).cpu() if len(own) else None

    parts = [part for part in ranks.together(explain_share) if part is not None]
    return Explanation.joined(parts) if ranks.divided else parts[0]
