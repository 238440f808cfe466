"""Attention rollout, gradient rollout and attention flow of explicit attention matrices.

Shapes: B images, L blocks, H heads, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_explain_callback.methods.attention_flow import maximum_flow, row_normalised
from vit_explain_callback.methods.attention_rollout import rollout_step
from vit_explain_callback.methods.heads import HeadFusion, discard_lowest, fuse_heads


def attention_rollout(
    attentions: Sequence[Tensor],
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_block: int = 1,
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
        start_block: First block s that takes part, counted from 1.
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
    checked_attentions(attentions, start_block)
    row = starting_row(attentions[0], readout)
    for attention in reversed(attentions[start_block - 1 :]):
        row = rollout_step(row, discard_lowest(fuse_heads(attention, head_fusion), discard_ratio, class_token))
    return row


def gradient_rollout(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_block: int = 1,
    readout: Tensor | None = None,
    class_token: int | None = 0,
) -> Tensor:
    """Gradient rollout, in the form of the vit-explain project: attention rollout with F = relu(fuse_h(A ⊙ ∂y_c/∂A)).

    Args:
        attentions: Softmax attention of each block, first block first: L tensors (B, H, N, N).
        gradients: ∂y_c/∂A of each block in the same order and shapes: the gradient of the target's logit with respect
            to the attention probabilities, not to the scores before the softmax.
        head_fusion: As in `attention_rollout`.
        discard_ratio: As in `attention_rollout`.
        start_block: As in `attention_rollout`.
        readout: As in `attention_rollout`.
        class_token: As in `attention_rollout`.

    Returns:
        Relevance of every input token for the target, (B, N), with the same sum as the starting row.

    Raises:
        ValueError: As `attention_rollout`; also if `gradients` does not match `attentions`.
    """
    checked_attentions(attentions, start_block)
    if [g.shape for g in gradients] != [a.shape for a in attentions]:
        raise ValueError(
            "Expected `gradients` of the same number and shapes as `attentions`, but got "
            f"{[tuple(g.shape) for g in gradients]} and {[tuple(a.shape) for a in attentions]}."
        )
    row = starting_row(attentions[0], readout)
    for layer in range(len(attentions) - 1, start_block - 2, -1):
        fused = fuse_heads(attentions[layer] * gradients[layer], head_fusion).relu()
        row = rollout_step(row, discard_lowest(fused, discard_ratio, class_token))
    return row


def attention_flow(
    attentions: Sequence[Tensor],
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_block: int = 1,
    readout: Tensor | None = None,
    class_token: int | None = 0,
) -> Tensor:
    """Attention flow (Abnar & Zuidema 2020, arXiv:2005.00928) of explicit attention matrices.

    In Vision Transformers of usual size it equals the bound min(1, column sum of Ā^s) at nearly every token, so that
    blocks above the first do not show in it: twelve blocks can carry far more than one token can receive.

    Args:
        attentions: Softmax attention of each block, first block first: L tensors (B, H, N, N).
        head_fusion: As in `attention_rollout`.
        discard_ratio: As in `attention_rollout`.
        start_block: As in `attention_rollout`.
        readout: What the source can give to each token after the last block, (N,) or (B, N). Default: 1 to token 0.
        class_token: As in `attention_rollout`.

    Returns:
        Maximum flow from the readout to every input token, (B, N) in float64, each exact to 1e-9. They do not sum to 1.

    Raises:
        ImportError: If OR-Tools is not installed.
        ValueError: As `attention_rollout`.

    Example:
        >>> uniform = torch.full((1, 1, 2, 2), 0.5)
        >>> attention_flow([uniform, uniform])
        tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    checked_attentions(attentions, start_block)
    row = starting_row(attentions[0], readout)
    matrices = [
        row_normalised(discard_lowest(fuse_heads(attention, head_fusion), discard_ratio, class_token))
        for attention in attentions[start_block - 1 :]
    ]
    tokens = range(row.shape[1])
    return torch.stack(
        [maximum_flow([matrix[image] for matrix in matrices], row[image], tokens).values for image in range(len(row))]
    )


def checked_attentions(attentions: Sequence[Tensor], start_block: int) -> None:
    """Refuse what is not the attention of a stack of blocks, or a start past its end.

    Raises:
        ValueError: If it is not.
    """
    shapes = [tuple(a.shape) for a in attentions]
    if not shapes or any(len(s) != 4 or s[2] != s[3] or s != shapes[0] for s in shapes):
        raise ValueError(f"Expected `attentions` to be L >= 1 tensors of one shape (B, H, N, N), but got {shapes}.")
    if not 1 <= start_block <= len(shapes):
        raise ValueError(f"Expected `start_block` in 1 … {len(shapes)} (the number of blocks), but got {start_block}.")


def starting_row(attention: Tensor, readout: Tensor | None) -> Tensor:
    """The readout as (B, N), one-hot on token 0 by default, for attention (B, H, N, N) of its device and dtype.

    Raises:
        ValueError: If `readout` is neither (N,) nor (B, N).
    """
    batch, _, tokens, _ = attention.shape
    if readout is None:
        row = attention.new_zeros(batch, tokens)
        row[:, 0] = 1
        return row
    if readout.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"Expected `readout` of shape ({tokens},) or ({batch}, {tokens}), but got {tuple(readout.shape)}."
        )
    return readout.to(attention).expand(batch, tokens)
