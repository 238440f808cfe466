"""Attention times gradient in the readout's rows with its sign, summed over blocks: for and against a class.

Shapes: b images, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.heads import Fusion


@dataclass(frozen=True)
class GradientAttention(Method):
    """Attention times its gradient with its sign, summed over blocks: what speaks for a class, and what against it.

    Σ_l r mean_h(A^l ⊙ ∂y_c/∂A^l), with r the readout: the class token's row, or the mean of the rows that are averaged.
    A ∂y/∂A is, to first order, what the logit would lose if that attention were taken away; so a patch with a negative
    sum speaks against the class. Maps have both signs; nothing is normalised, so a gradient that is k times as large
    gives a map that is k times as large, and no other. It is `GradSAM` without the relu. Gradient rollout without the
    relu would have to divide by row sums that can be near 0.

    Where an attention-pooling head does the reading, its own row is one more term of the sum, and r is its attention,
    the mean over its heads and queries.

    Args:
        start_block: First block that takes part, counted from 1, or from the end if negative: -1 is the last.

    Raises:
        ValueError: If it is 0.

    Example:
        >>> GradientAttention().name
        'grad_attention'
    """

    start_block: int = 1

    kind = "grad_attention"

    @property
    def fusion(self) -> Fusion:
        """mean_h(A ⊙ ∂y_c/∂A), with its sign."""
        return Fusion(of="weighted")

    def start(self, readout: Tensor, pool: Tensor | None) -> Tensor:
        """Nothing, or the pooling head's own row."""
        return torch.zeros_like(readout) if pool is None else pool

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Add the readout's row of a block, (b, N)."""
        return relevance + (block.readout[:, None] @ block.fused)[:, 0]
