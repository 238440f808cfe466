"""Ask a trainer how its module is called, and what its processes hold of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_kind, is_overridden
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.vit.adapter import LogitsOf
from vit_explain_callback.vit.timm import find_vit


def ranks_of(trainer: Trainer) -> Ranks:
    """The processes of a trainer whose strategy is set up.

    Raises:
        ValueError: If its processes divide the heads of each attention among them.
    """
    strategy = trainer.strategy
    mesh = getattr(strategy, "_device_mesh", None)  # of `ModelParallelStrategy`, public only inside the module
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "Expected every process to compute all heads of an attention, but the strategy's `tensor_parallel_size`"
            f" is {mesh['tensor_parallel'].size()}: no process sees a whole attention matrix. Explain checkpoints "
            "of this run with `explain` instead."
        )
    whole_model = is_kind(strategy, "DDPStrategy") and not is_kind(strategy, "DeepSpeedStrategy")
    return Ranks(trainer.global_rank, trainer.world_size, trainer.world_size == 1 or whole_model)


def explained_module(
    pl_module: LightningModule, vit: str | None, forward: LogitsOf | None, needs_vit: bool
) -> nn.Module:
    """What turns images into logits: the LightningModule if it can, else the ViT itself.

    Raises:
        ValueError: If neither can.
    """
    if forward is not None or is_overridden("forward", pl_module):
        return pl_module
    if not needs_vit:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to define `forward(images)`, returning logits, but it does not. Say "
            "how to get them: `ViTExplainCallback(forward=lambda module, images: module.model(images))`."
        )
    found = find_vit(pl_module, vit)
    if found is pl_module:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to define `forward(images)`, returning logits, or `vit=` to name "
            "the attribute that holds its model, but got neither."
        )
    return found


def forward_of(trainer: Trainer) -> LogitsOf | None:
    """How the LightningModule is called by a trainer whose strategy needs more than that, else None."""
    if not is_kind(trainer.strategy, "FSDPStrategy"):
        return None
    # Parameters outside of every wrapped submodule are gathered by the outermost wrapper alone.
    outermost = trainer.strategy.model

    def forward(_: nn.Module, images: Tensor) -> Any:
        assert outermost is not None
        return outermost(images)

    return forward
