"""Positive attention times gradient in the readout's rows, summed over blocks, after Grad-SAM.

Shapes: b images, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.heads import Fusion


@dataclass(frozen=True)
class GradSAM(Method):
    """Attention times its gradient where that is positive, summed over blocks, for a class.

    Σ_l r Ē^l, with Ē = mean_h relu(A ⊙ ∂y_c/∂A) and r the readout: the class token's row, or the mean of the rows that
    are averaged. As nothing is normalised or multiplied from block to block, a gradient that is k times as large gives
    a map that is k times as large, and no other.

    After Grad-SAM (Barkan et al. 2021, arXiv:2204.11073), which was made for text and sums over the attention of all
    tokens; here it is that of the readout alone.

    Where an attention-pooling head does the reading, its own row of Ē is one more term of the sum, and r is its
    attention, the mean over its heads and queries.

    Args:
        start_block: First block that takes part, counted from 1, or from the end if negative: -1 is the last.

    Raises:
        ValueError: If it is 0.

    Example:
        >>> GradSAM(start_block=7).name
        'gradsam_from7'
    """

    start_block: int = 1

    kind = "gradsam"

    @property
    def fusion(self) -> Fusion:
        """Ē = mean_h relu(A ⊙ ∂y_c/∂A)."""
        return Fusion(of="weighted", positive="before")

    def start(self, readout: Tensor, pool: Tensor | None) -> Tensor:
        """Nothing, or the pooling head's row of Ē."""
        return torch.zeros_like(readout) if pool is None else pool

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Add the readout's row of a block, (b, N)."""
        return relevance + (block.readout[:, None] @ block.fused)[:, 0]
