"""Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928): where information flows from, whatever the class.

Shapes: B images, L blocks, H heads, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Block
from vit_explain_callback.methods.explicit import checked_attentions, starting_row
from vit_explain_callback.methods.fused_method import FusedMethod
from vit_explain_callback.methods.fusion import HeadFusion, discard_lowest, fuse_heads


class Rollout(FusedMethod):
    """Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928): where information flows from, whatever the class.

    Example:
        >>> Rollout(head_fusion="max", discard_ratio=0.9).name
        'rollout_max_0.9'
    """

    kind = "rollout"

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Carry (b, N) of relevance through a block: r Ā; see `rollout_step`."""
        return rollout_step(relevance, self.kept(block))


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


def attention_rollout(
    attentions: Sequence[Tensor],
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 1,
    readout: Tensor | None = None,
    class_token: int | None = 0,
) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928) of explicit attention matrices.

    R = Ā^L Ā^(L-1) … Ā^s with Ā = rownorm(F + I), F the fused attention after discarding; the result is the readout's
    row of R, found with vector–matrix products alone.

    Args:
        attentions: Softmax attention of each block, first block first: L tensors (B, H, N, N).
        head_fusion: How heads are fused: `mean`, `max` or `min`.
        discard_ratio: Share of the smallest entries of each fused matrix set to zero, in [0, 1).
        start_layer: First block s that takes part, counted from 1.
        readout: The starting row, (N,) or (B, N). Default: one-hot on token 0, the class token.
        class_token: Index of the class token, or None; see `discard_lowest`.

    Returns:
        Relevance of every input token for the readout, (B, N), with the same sum as the starting row.

    Raises:
        ValueError: If an argument is outside its range or a tensor is not (B, H, N, N).

    Example:
        >>> identity = torch.eye(3).expand(1, 2, 3, 3)
        >>> attention_rollout([identity, identity])
        tensor([[1., 0., 0.]])
    """
    checked_attentions(attentions, start_layer)
    row = starting_row(attentions[0], readout)
    for attention in reversed(attentions[start_layer - 1 :]):
        row = rollout_step(row, discard_lowest(fuse_heads(attention, head_fusion), discard_ratio, class_token))
    return row
