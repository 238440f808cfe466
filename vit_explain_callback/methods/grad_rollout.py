"""Gradient rollout: attention rollout of attention that is weighted by its gradient, as the vit-explain project does.

The mean over heads of A ⊙ ∂y_c/∂A is taken first, its negative part is removed then, and rows are normalised with the
residual. The relevance of Chefer et al. 2021 (arXiv:2103.15679), which it grew out of, clamps before the mean and does
not normalise.

Shapes: B images, L blocks, H heads, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vit_explain_callback.methods.base import Block
from vit_explain_callback.methods.explicit import checked_attentions, starting_row
from vit_explain_callback.methods.fused_method import FusedMethod
from vit_explain_callback.methods.fusion import Fusion, HeadFusion, discard_lowest, fuse_heads
from vit_explain_callback.methods.rollout import rollout_step


class GradRollout(FusedMethod):
    """Gradient rollout as in the vit-explain project: attention weighted by the gradient of the target's logit.

    F = relu(fuse_h(A ⊙ ∂y_c/∂A)), and then as attention rollout; so it depends on the class.

    Example:
        >>> GradRollout(start_layer=4).name
        'grad_rollout_from4'
    """

    kind = "grad_rollout"

    @property
    def fusion(self) -> Fusion:
        """F = relu(fuse_h(A ⊙ ∂y_c/∂A))."""
        return Fusion(self.head_fusion, of="weighted", positive="after")

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        """Carry (b, N) of relevance through a block: r Ā; see `rollout_step`."""
        return rollout_step(relevance, self.kept(block))


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
    """Gradient rollout, in the form of the vit-explain project: attention rollout with F = relu(fuse_h(A ⊙ ∂y_c/∂A)).

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
    row = starting_row(attentions[0], readout)
    for layer in range(len(attentions) - 1, start_layer - 2, -1):
        fused = fuse_heads(attentions[layer] * gradients[layer], head_fusion).relu()
        row = rollout_step(row, discard_lowest(fused, discard_ratio, class_token))
    return row
