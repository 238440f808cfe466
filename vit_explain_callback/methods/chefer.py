"""The relevance of Chefer, Gur & Wolf 2021 (arXiv:2103.15679): what the prediction draws on, for a class.

Shapes: b images, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.heads import Fusion


@dataclass(frozen=True)
class Chefer(Method):
    """Relevance of Chefer, Gur & Wolf 2021 (arXiv:2103.15679), for a class.

    R ← R + Ē R from the first block to the last, beginning with R = I, and with Ē = mean_h relu(A ⊙ ∂y_c/∂A): negative
    entries are dropped before the mean over heads, and no row is normalised. The map is the readout's row of R.

    That row of I is in it too: one more for the class token itself, and in a model that averages its patches the same
    constant at each of them. Where an attention-pooling head does the reading, the row is Ē_pool R, as in the paper's
    rule for attention between two sets of tokens.

    Args:
        start_block: First block that takes part, counted from 1, or from the end if negative: -1 is the last.

    Raises:
        ValueError: If it is 0.

    Example:
        >>> Chefer(start_block=-4).name
        'chefer_from-4'
    """

    start_block: int = 1

    kind = "chefer"

    @property
    def fusion(self) -> Fusion:
        """Ē = mean_h relu(A ⊙ ∂y_c/∂A)."""
        return Fusion(of="weighted", positive="before")

    def start(self, readout: Tensor, pool: Tensor | None) -> Tensor:
        """The readout's row of I, or the pooling head's row of Ē."""
        return readout if pool is None else pool

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Carry (b, N) through a block: r ← r + r Ē, so that the readout's row of R is had without R."""
        return relevance + (relevance[:, None] @ block.fused)[:, 0]
