"""Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928): where information flows from, whatever the class.

Shapes: B images, L blocks, H heads, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Block, FusedMethod


class AttentionRollout(FusedMethod):
    """Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928): where information flows from, whatever the class.

    Example:
        >>> AttentionRollout(head_fusion="max", discard_ratio=0.9).name
        'rollout_max_0.9'
    """

    kind = "rollout"

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Carry (b, N) of relevance through a block: r Ā; see `rollout_step`."""
        return rollout_step(relevance, self.without_lowest(block))


def rollout_step(row: Tensor, fused: Tensor) -> Tensor:
    """Carry a row of relevance through one block: r Ā with Ā = rownorm(F + I).

    Each row of F + I is divided by its own sum. Ā is never formed: with s the row sums of F + I,
    r Ā = (r / s) F + r / s.

    Args:
        row: Relevance of the tokens above the block, (B, N).
        fused: Fused attention of the block, (B, N, N), query rows and key columns.

    Returns:
        Relevance of the tokens below the block, (B, N), with the same sum as `row`.
    """
    weight = row / (fused.sum(dim=-1) + 1)
    return torch.baddbmm(weight[:, None], weight[:, None], fused)[:, 0]
