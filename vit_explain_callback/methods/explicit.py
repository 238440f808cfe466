"""Check attention matrices that are given explicitly, and the row that relevance starts from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


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
