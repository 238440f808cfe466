"""Attention of one block: what the readout, or a patch, attends to.

Shapes: b images, H heads, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Block, Method, block_number
from vit_explain_callback.methods.heads import Fusion, HeadFusion


@dataclass(frozen=True)
class Attention(Method):
    """What the readout attends to in one block, whatever the class: r fuse_h(A).

    r is the class token's row, the mean of the rows that are averaged, or what an attention-pooling head attends to.
    `explain(…, query=(row, column))` takes the row of that patch instead.

    Args:
        head_fusion: How the heads of the block are fused: `mean`, `max` or `min`.
        block: The block, counted from 1, or from the end if negative: -1 is the last.
        head: The only head to show, counted from 1; None for all.

    Raises:
        ValueError: If an option is outside its range, or both a head and a fusion are given.

    Example:
        >>> Attention(block=12, head=3).name
        'attention_block12_head3'
    """

    head_fusion: HeadFusion = "mean"
    block: int = -1
    head: int | None = None

    kind = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is not None and self.head_fusion != "mean":
            raise ValueError(
                f"Expected either a `head_fusion` or one `head`, but got {self.head_fusion!r} and head {self.head}: "
                "one head alone is not fused."
            )

    @property
    def fusion(self) -> Fusion:
        """fuse_h(A), or A of one head."""
        return Fusion(self.head_fusion, head=self.head)

    def layers(self, blocks: int) -> range:
        """The block.

        Raises:
            ValueError: If the model does not have it.
        """
        number = block_number("block", self.block, blocks, self.name)
        return range(number, number + 1)

    def start(self, readout: Tensor, pool: Tensor | None) -> Tensor:
        """Nothing."""
        return torch.zeros_like(readout)

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """The readout's row of the block, (b, N)."""
        return (block.readout[:, None] @ block.fused)[:, 0]
