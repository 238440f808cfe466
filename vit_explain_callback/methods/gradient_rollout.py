"""Gradient rollout: attention rollout of attention that is weighted by its gradient, as the vit-explain project does.

The mean over heads of A ⊙ ∂y_c/∂A is taken first, its negative part is removed then, and rows are normalised with the
residual. The relevance of Chefer et al. 2021 (arXiv:2103.15679), which it grew out of, clamps before the mean and does
not normalise.

Shapes: B images, L blocks, H heads, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from vit_explain_callback.methods.attention_rollout import rollout_step
from vit_explain_callback.methods.base import Block, FusedMethod
from vit_explain_callback.methods.heads import Fusion


class GradientRollout(FusedMethod):
    """Gradient rollout as in the vit-explain project: attention weighted by the gradient of the target's logit.

    F = relu(fuse_h(A ⊙ ∂y_c/∂A)), and then as attention rollout; so it depends on the class.

    Example:
        >>> GradientRollout(start_block=4).name
        'grad_rollout_from4'
    """

    kind = "grad_rollout"

    @property
    def fusion(self) -> Fusion:
        """F = relu(fuse_h(A ⊙ ∂y_c/∂A))."""
        return Fusion(self.head_fusion, of="weighted", positive="after")

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Carry (b, N) of relevance through a block: r Ā; see `rollout_step`."""
        return rollout_step(relevance, self.without_lowest(block))
