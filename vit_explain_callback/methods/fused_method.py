"""The options that attention rollout, gradient rollout and attention flow share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.fusion import Fusion, HeadFusion, discard_lowest


@dataclass(frozen=True)
class FusedMethod(Method):
    """A method that fuses heads, drops the lowest entries and starts at some block.

    Args:
        head_fusion: How the heads of a block are fused: `mean`, `max` or `min`.
        discard_ratio: Share of the smallest entries of each fused matrix set to zero, in [0, 1).
        start_layer: First block that takes part, counted from 1, or from the end if negative: -1 is the last.

    Raises:
        ValueError: If an option is outside its range.
    """

    head_fusion: HeadFusion = "mean"
    discard_ratio: float = 0.0
    start_layer: int = 1

    @property
    def fusion(self) -> Fusion:
        """F = fuse_h(A)."""
        return Fusion(self.head_fusion)

    @property
    def pool_fusion(self) -> Fusion:
        """A pooling head is read as the blocks are."""
        return self.fusion

    def kept(self, block: Block) -> Tensor:
        """A block's fused matrix without its lowest entries, (b, N, N)."""
        return discard_lowest(block.fused, self.discard_ratio, block.class_token)
