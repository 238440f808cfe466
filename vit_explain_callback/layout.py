"""Which token is what: prefix tokens, the grid of patches, and the tokens that the classifier reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The tokens of a Vision Transformer for one size of image.

    Attributes:
        tokens: N, prefix tokens and patches together.
        first_patch: Index of the first patch; the patches follow one another, row by row.
        grid: Patches as (grid_h, grid_w).
        class_token: Index of the class token, or None.
        readout: Weight of each token in what the classifier reads, (N,) summing to 1; None where an attention-pooling
            head does the reading.
    """

    tokens: int
    first_patch: int
    grid: tuple[int, int]
    class_token: int | None
    readout: Tensor | None

    @property
    def patches(self) -> slice:
        """Where the patches are among the tokens."""
        return slice(self.first_patch, self.first_patch + self.grid[0] * self.grid[1])

    def to_grid(self, row: Tensor) -> Tensor:
        """Keep the patches of a token row: (B, N) to (B, grid_h, grid_w)."""
        return row[:, self.patches].reshape(-1, *self.grid)


def mean_of(rows: range, tokens: int) -> Tensor:
    """(N,) readout that is the mean of some tokens."""
    readout = torch.zeros(tokens, dtype=torch.float64)
    readout[rows.start : rows.stop] = 1 / len(rows)
    return readout
