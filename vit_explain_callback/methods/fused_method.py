"""The options that attention rollout, gradient rollout and attention flow share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.fusion import HEAD_FUSIONS, Fusion, HeadFusion, discard_lowest


@dataclass(frozen=True)
class FusedMethod(Method):
    """A method that fuses heads, drops the lowest entries and starts at some block.

    Args:
        head_fusion: How the heads of a block are fused: `mean`, `max` or `min`.
        discard_ratio: Share of the smallest entries of each fused matrix set to zero, in [0, 1).
        start_layer: First block that takes part, counted from 1.

    Raises:
        ValueError: If an option is outside its range.
    """

    head_fusion: HeadFusion = "mean"
    discard_ratio: float = 0.0
    start_layer: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_fusion not in HEAD_FUSIONS:
            raise ValueError(
                f"Expected `head_fusion` to be one of {', '.join(HEAD_FUSIONS)}, but got {self.head_fusion!r}."
            )
        if not 0 <= self.discard_ratio < 1:
            raise ValueError(f"Expected `discard_ratio` in [0, 1), but got {self.discard_ratio}.")
        if self.start_layer < 1:
            raise ValueError(f"Expected `start_layer` of at least 1 (the first block), but got {self.start_layer}.")

    @property
    def name(self) -> str:
        """The kind, followed by every option that is not at its default."""
        parts = [self.kind]
        if self.head_fusion != "mean":
            parts.append(self.head_fusion)
        if self.discard_ratio:
            parts.append(f"{self.discard_ratio:g}")
        if self.start_layer != 1:
            parts.append(f"from{self.start_layer}")
        return "_".join(parts)

    @property
    def fusion(self) -> Fusion:
        """F = fuse_h(A)."""
        return Fusion(self.head_fusion)

    def layers(self, blocks: int) -> range:
        """The blocks from `start_layer` on.

        Raises:
            ValueError: If the model has fewer.
        """
        if self.start_layer > blocks:
            raise ValueError(
                f"Expected `start_layer` in 1 … {blocks} (the model's blocks), but {self.name} has {self.start_layer}."
            )
        return range(self.start_layer, blocks + 1)

    def kept(self, block: Block) -> Tensor:
        """A block's fused matrix without its lowest entries, (b, N, N)."""
        return discard_lowest(block.fused, self.discard_ratio, block.class_token)
