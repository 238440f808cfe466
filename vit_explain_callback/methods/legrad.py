"""LeGrad (Bousselham et al. 2024, arXiv:2404.03214): how sensitive the logit of each block is to its attention.

Shapes: b images, H heads, N tokens, Q queries of an attention pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.heads import Fusion


@dataclass(frozen=True)
class LeGrad(Method):
    """LeGrad (Bousselham et al. 2024, arXiv:2404.03214): sensitivity of each block's logit to attention, for a class.

    Σ_l mean_(h, queries) relu(∂s^l/∂A^l), where s^l is the logit that the model's own norm, pooling and head give the
    class if they read the tokens after block l. The gradient alone counts; it is not multiplied by the attention.

    - In a model that averages its patches, s^l is of the mean of block l's patches, as published.
    - In a model that reads its class token, s^l is of block l's class token, through the final norm and the head. It
      depends on the class token's row of A^l alone, so the mean over queries is that row divided by N. The authors'
      code (github.com/WalBouss/LeGrad) gives the head the mean of all tokens instead, also for class-token models,
      whose head was never trained on that mean.
    - Where an attention-pooling head does the reading, the gradient is at that head's attention over the tokens of
      block l, as in the authors' code for SigLIP.

    It takes a forward pass of its own. The authors' code takes the last two blocks by default, `legrad_from-2`.

    Args:
        start_block: First block that takes part, counted from 1, or from the end if negative: -1 is the last.

    Raises:
        ValueError: If it is 0.

    Example:
        >>> LeGrad(start_block=-2).name
        'legrad_from-2'
    """

    start_block: int = 1

    kind = "legrad"

    @property
    def fusion(self) -> Fusion:
        """mean_h relu(∂s^l/∂A^l)."""
        return Fusion(of="block_gradient", positive="before")

    def start(self, readout: Tensor, pool: Tensor | None) -> Tensor:
        """Nothing."""
        return torch.zeros_like(readout)

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Add the mean over a block's queries, (b, N)."""
        return relevance + block.fused.mean(dim=1)
