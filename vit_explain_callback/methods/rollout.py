"""Attention rollout and gradient rollout from explicit attention matrices: pure functions on tensors.

Shapes: B images, L blocks, H heads, N tokens.

Sources: attention rollout, Abnar & Zuidema 2020 (arXiv:2005.00928); weighting attention by its gradient, after Chefer
et al. 2021 (arXiv:2103.15679), with the fusion and discarding of the vit-explain project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

HeadFusion = Literal["mean", "max", "min"]
HEAD_FUSIONS: tuple[str, ...] = get_args(HeadFusion)


class HeadFuser:
    """Fuses heads that arrive a few at a time, so that all of them need never exist together.

    `mean` divides by the number of heads seen; `max` and `min` are elementwise over heads.

    Example:
        >>> fuser = HeadFuser("max")
        >>> fuser.add(torch.tensor([[[[1.0, 5.0]]]]))
        >>> fuser.add(torch.tensor([[[[2.0, 3.0]]]]))
        >>> fuser.result()
        tensor([[[2., 5.]]])
    """

    def __init__(self, fusion: HeadFusion) -> None:
        if fusion not in HEAD_FUSIONS:
            raise ValueError(f"Expected `head_fusion` to be one of {', '.join(HEAD_FUSIONS)}, but got {fusion!r}.")
        self._fusion = fusion
        self._heads = 0
        self._fused: Tensor | None = None

    def add(self, attention: Tensor) -> None:
        """Take in some heads of the same image batch, (B, h, N, N)."""
        self._heads += attention.shape[1]
        if self._fusion == "mean":
            part = attention.sum(dim=1)
            self._fused = part if self._fused is None else self._fused.add_(part)
        elif self._fusion == "max":
            part = attention.amax(dim=1)
            self._fused = part if self._fused is None else torch.maximum(self._fused, part)
        else:
            part = attention.amin(dim=1)
            self._fused = part if self._fused is None else torch.minimum(self._fused, part)

    def result(self) -> Tensor:
        """The fused attention of all heads added so far, (B, N, N)."""
        if self._fused is None:
            raise RuntimeError("Expected at least one head to be added before `result()`, but got none.")
        return self._fused / self._heads if self._fusion == "mean" else self._fused


def fuse_heads(attention: Tensor, fusion: HeadFusion = "mean") -> Tensor:
    """Fuse the heads of one block: (B, H, N, N) to (B, N, N).

    Raises:
        ValueError: If `fusion` is not `mean`, `max` or `min`.
    """
    fuser = HeadFuser(fusion)
    fuser.add(attention)
    return fuser.result()


def discard_lowest(fused: Tensor, discard_ratio: float, class_token: int | None = 0) -> Tensor:
    """Set the ⌊discard_ratio · N²⌋ smallest entries of every image's matrix to zero.

    Each image has its own threshold. Entries that tie with the smallest kept one are kept, so that the result does not
    depend on the order of the tokens.

    Args:
        fused: Fused attention, (B, N, N).
        discard_ratio: Share of the entries to drop, in [0, 1).
        class_token: Index of the class token, whose own entry (class, class) is never dropped; None where the model
            has none.

    Returns:
        A new (B, N, N) tensor, or `fused` itself where nothing is to be dropped.

    Raises:
        ValueError: If `discard_ratio` lies outside [0, 1).

    Example:
        >>> discard_lowest(torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]), 0.5, class_token=0)
        tensor([[[0.1000, 0.0000],
                 [0.3000, 0.4000]]])
    """
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"Expected `discard_ratio` in [0, 1), but got {discard_ratio}.")
    entries = fused.flatten(1)
    dropped = int(discard_ratio * entries.shape[1])
    if dropped == 0:
        return fused
    smallest_kept = _smallest_but(dropped, entries)
    kept = fused.masked_fill(fused < smallest_kept[:, None, None], 0)
    if class_token is not None:
        kept[:, class_token, class_token] = fused[:, class_token, class_token]
    return kept


def _smallest_but(count: int, entries: Tensor) -> Tensor:
    """The smallest entry of each row but for `count` smaller ones: (B, n) to (B,)."""
    if entries.device.type == "cpu" and entries.dtype in (torch.float32, torch.float64):
        # The same value as torch's, several times as fast.
        return torch.from_numpy(np.partition(entries.detach().numpy(), count, axis=1)[:, count])
    return entries.kthvalue(count + 1, dim=1).values


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
    fused = [fuse_heads(attention, head_fusion) for attention in attentions[start_layer - 1 :]]
    return _roll(fused, discard_ratio, starting_row(attentions[0], readout), class_token)


def gradient_rollout(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 1,
    readout: Tensor | None = None,
    class_token: int | None = 0,
) -> Tensor:
    """Gradient rollout: attention rollout with F = relu(fuse_h(A ⊙ ∂y_c/∂A)).

    Args:
        attentions: Softmax attention of each block, first block first: L tensors (B, H, N, N).
        gradients: ∂y_c/∂A of each block in the same order and shapes: the gradient of the target's logit with respect
            to the attention probabilities, not to the scores before the softmax.
        head_fusion: As in `attention_rollout`.
        discard_ratio: As in `attention_rollout`.
        start_layer: As in `attention_rollout`.
        readout: As in `attention_rollout`.
        class_token: As in `attention_rollout`.

    Returns:
        Relevance of every input token for the target, (B, N), with the same sum as the starting row.

    Raises:
        ValueError: As `attention_rollout`; also if `gradients` does not match `attentions`.
    """
    checked_attentions(attentions, start_layer)
    if [g.shape for g in gradients] != [a.shape for a in attentions]:
        raise ValueError(
            "Expected `gradients` of the same number and shapes as `attentions`, but got "
            f"{[tuple(g.shape) for g in gradients]} and {[tuple(a.shape) for a in attentions]}."
        )
    pairs = list(zip(attentions, gradients, strict=True))[start_layer - 1 :]
    fused = [fuse_heads(attention * gradient, head_fusion).relu() for attention, gradient in pairs]
    return _roll(fused, discard_ratio, starting_row(attentions[0], readout), class_token)


def checked_attentions(attentions: Sequence[Tensor], start_layer: int) -> None:
    """Refuse what is not the attention of a stack of blocks, or a start past its end.

    Raises:
        ValueError: If it is not.
    """
    shapes = [tuple(a.shape) for a in attentions]
    if not shapes or any(len(s) != 4 or s[2] != s[3] or s != shapes[0] for s in shapes):
        raise ValueError(f"Expected `attentions` to be L >= 1 tensors of one shape (B, H, N, N), but got {shapes}.")
    if not 1 <= start_layer <= len(shapes):
        raise ValueError(f"Expected `start_layer` in 1 … {len(shapes)} (the number of blocks), but got {start_layer}.")


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


def _roll(fused: list[Tensor], discard_ratio: float, row: Tensor, class_token: int | None) -> Tensor:
    for matrix in reversed(fused):
        row = rollout_step(row, discard_lowest(matrix, discard_ratio, class_token))
    return row
