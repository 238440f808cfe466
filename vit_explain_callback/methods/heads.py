"""Fuse the heads of a block into one matrix, and drop its smallest entries.

Shapes: B images, h of H heads at a time, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

HeadFusion = Literal["mean", "max", "min"]
HEAD_FUSIONS: tuple[str, ...] = get_args(HeadFusion)

_OVER_HEADS: dict[str, Callable[..., Tensor]] = {"mean": torch.sum, "max": torch.amax, "min": torch.amin}
_OF_TWO: dict[str, Callable[..., Tensor]] = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}
_SAMPLE = 1024  # entries that tell where a threshold lies


@dataclass(frozen=True)
class Fusion:
    """The matrix F, (B, N, N), that a method needs; methods with equal fusions share it.

    Attributes:
        head_fusion: How the heads are fused: `mean`, `max` or `min`.
        of: What is fused: `attention` A; `weighted` attention A ⊙ ∂y/∂A, with y the target's logit; or
            `block_gradient` ∂s/∂A, with s the logit that the model's own head gives the target if it reads the tokens
            that leave this block instead of the last.
        positive: Where negative entries are set to zero: `before` or `after` the heads are fused, or None.
        head: The only head that counts, from 1; None for all.
    """

    head_fusion: HeadFusion = "mean"
    of: Literal["attention", "weighted", "block_gradient"] = "attention"
    positive: Literal["before", "after"] | None = None
    head: int | None = None


class HeadFuser:
    """Fuses heads a few at a time, so that they need not all exist at once.

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
        if self._fused is None:
            self._fused = _OVER_HEADS[self._fusion](attention, dim=1)
            return
        # One head, as where there are many tokens, is taken in without a copy.
        part = attention[:, 0] if attention.shape[1] == 1 else _OVER_HEADS[self._fusion](attention, dim=1)
        _OF_TWO[self._fusion](self._fused, part, out=self._fused)

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
    threshold = _smallest_but(dropped, entries)
    remaining = fused.masked_fill(fused < threshold[:, None, None], 0)
    if class_token is not None:
        remaining[:, class_token, class_token] = fused[:, class_token, class_token]
    return remaining


def _smallest_but(count: int, entries: Tensor) -> Tensor:
    """The entry of rank `count`, from 0, in each row: (B, n) to (B,)."""
    if entries.device.type == "cpu" and entries.dtype in (torch.float32, torch.float64):
        # The same value as torch's, several times as fast.
        return torch.from_numpy(np.stack([_smallest_of_row(count, row) for row in entries.detach().numpy()]))
    # Not `kthvalue`, which torch up to some release refuses on CUDA where algorithms are to be deterministic.
    return entries.topk(entries.shape[1] - count, dim=1, sorted=False).values.amin(dim=1)


def _smallest_of_row(count: int, row: np.ndarray) -> Any:
    """The entry of rank `count`, from 0, in (n,); the same as `np.partition(row, count)[count]`.

    A sample gives two values between which it almost surely lies, and only the entries between them are partitioned.
    Partitioning all of them takes up to ten times as long on NumPy 1.24, and on any version where half are zeros.
    """
    sample = np.sort(row[:: max(1, row.size // _SAMPLE)])
    share = count / row.size
    margin = 4 * math.sqrt(share * (1 - share) / sample.size)
    first, last = (int((share + sign * margin) * sample.size) for sign in (-1, 1))
    low, high = sample[max(0, first)], sample[min(sample.size - 1, last)]
    below, up_to = int(np.count_nonzero(row < low)), int(np.count_nonzero(row <= low))
    between = row[(row > low) & (row < high)]
    left = count - up_to - between.size
    if below <= count < up_to:
        return low
    if count >= up_to and left < 0:
        return np.partition(between, count - up_to)[count - up_to]
    if count >= up_to and left < np.count_nonzero(row == high):
        return high
    return np.partition(row, count)[count]
